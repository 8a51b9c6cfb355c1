"""Licences, opt-outs and captions: what is said beside a picture decides, too."""

import hashlib
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.training.data.scenes import encoded, scene
from training.data.clean import CleanConfig, Judgement, Tools, fingerprint, judge
from training.data.clean.captions import CaptionConfig, clean_caption
from training.data.clean.consent import ConsentConfig, domain_name
from training.errors import ConfigError

DATA = encoded(scene(64, 64))


def judged(fields: dict[str, object], config: CleanConfig) -> Judgement:
    return judge(DATA, {"caption": "a scene", **fields}, config, Tools.of(config))


def rule(fields: dict[str, object], consent: ConsentConfig) -> str:
    finding = judged(fields, CleanConfig(consent=consent)).finding
    return finding.rule if finding else ""


def test_only_licences_of_the_list_are_accepted() -> None:
    some = ConsentConfig(licences=("CC0", "CC BY 4.0"))
    for stated in ("CC0", "cc0 ", "cc-by-4.0", "CC_BY  4.0"):
        assert rule({"licence": stated}, some) == ""
        assert rule({"license": stated}, some) == ""
    for stated in ("CC BY-NC 4.0", "cc", "CC BY 4.0 or similar"):
        assert rule({"licence": stated}, some) == "licence_not_accepted"
    assert rule({}, some) == "no_licence"
    assert rule({"licence": ""}, some) == "no_licence"
    assert rule({}, ConsentConfig(licences=("CC0", "unstated"))) == ""
    assert rule({"licence": "anything"}, ConsentConfig()) == ""


def test_a_licence_can_be_required() -> None:
    required = ConsentConfig(require_licence=True)
    assert rule({}, required) == "no_licence"
    assert rule({"licence": None}, required) == "no_licence"
    assert rule({"licence": "anything"}, required) == ""
    assert rule({}, ConsentConfig(require_licence=True, licences=("unstated",))) == "no_licence"


@pytest.fixture
def lists(tmp_path: Path) -> ConsentConfig:
    (tmp_path / "hashes.txt").write_text(f"# who asked\n\n{hashlib.sha256(DATA).hexdigest().upper()}  # a picture\n")
    (tmp_path / "domains.txt").write_text("Example.COM\n*.art.example.org # all of it\nbücher.example\n", "utf-8")
    (tmp_path / "creators.txt").write_text("\ufeffJane  Doe\r\nŁukasz #1\r\n", "utf-8")
    names = ("hashes", "domains", "creators")
    return ConsentConfig(**{f"opt_out_{name}": (tmp_path / f"{name}.txt",) for name in names})


def test_a_picture_whose_hash_opted_out_is_dropped(lists: ConsentConfig) -> None:
    assert rule({}, lists) == "opt_out_hash"
    other = encoded(scene(64, 64, 1))
    config = CleanConfig(consent=lists)
    assert judge(other, {}, config, Tools.of(config)).finding is None


@pytest.mark.parametrize(
    ("fields", "dropped"),
    [
        ({"url": "https://example.com/a.jpg"}, True),
        ({"url": "https://IMG.cdn.Example.com:8443/a.jpg?x#y"}, True),
        ({"url": "http://user:word@example.com./a.jpg"}, True),
        ({"domain": "www.example.com"}, True),
        ({"domain": "harmless.net", "url": "https://example.com/a.jpg"}, True),  # what is stated may be wrong
        ({"domain": "https://example.com/"}, True),
        ({"url": "https://deep.art.example.org/a.jpg"}, True),
        ({"url": "https://art.example.org/a.jpg"}, True),
        ({"url": "https://xn--bcher-kva.example/a.jpg"}, True),
        ({"url": "https://BÜCHER.example/a.jpg"}, True),
        ({"url": "https://notexample.com/a.jpg"}, False),
        ({"url": "https://example.com.evil.net/a.jpg"}, False),
        ({"url": "https://example.org/a.jpg"}, False),
        ({"url": "http://[::1"}, False),
        ({"url": ""}, False),
    ],
)
def test_domains_opt_out_with_all_below_them(fields: dict[str, object], dropped: bool, lists: ConsentConfig) -> None:
    domains = lists.model_copy(update={"opt_out_hashes": ()})
    assert rule(fields, domains) == ("opt_out_domain" if dropped else "")


@pytest.mark.parametrize(
    ("fields", "dropped"),
    [
        ({"creator": "jane doe"}, True),
        ({"author": "JANE \t DOE"}, True),
        ({"artist": "Jane\u00a0Doe"}, True),
        ({"creator": "somebody", "artist": "Jane Doe"}, True),
        ({"creator": ["Somebody", "Jane Doe"]}, True),
        ({"creator": "Ｊane Doe"}, True),  # noqa: RUF001 - a wide letter is the same letter
        ({"creator": "Łukasz"}, True),
        ({"creator": "Jane Doe Junior"}, False),
        ({"creator": ""}, False),
        ({"creator": 7}, False),
    ],
)
def test_creators_opt_out_however_they_are_written(
    fields: dict[str, object], dropped: bool, lists: ConsentConfig
) -> None:
    assert rule(fields, lists.model_copy(update={"opt_out_hashes": ()})) == ("opt_out_creator" if dropped else "")


@pytest.mark.parametrize(
    ("option", "text", "said"),
    [
        ("opt_out_hashes", "abc\n", "64 hexadecimal digits"),
        ("opt_out_hashes", "0" * 64 + "\n" + "g" * 64, ":2: "),
        ("opt_out_domains", "not a domain..\n", "a domain"),
    ],
)
def test_a_list_that_is_not_understood_stops_everything(option: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ConfigError, match=option) as error:
        Tools.of(CleanConfig(consent=ConsentConfig.model_validate({option: [tmp_path / "list.txt"]})))
    assert said in str(error.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        Tools.of(CleanConfig(consent=ConsentConfig.model_validate({option: [tmp_path / "gone.txt"]})))
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\0")
    with pytest.raises(ConfigError, match="cannot be read"):
        Tools.of(CleanConfig(consent=ConsentConfig.model_validate({option: [tmp_path / "list.txt"]})))


def test_lists_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    consent = ConsentConfig(opt_out_domains=(Path("list.txt"),))
    assert consent.opt_out_domains == (tmp_path / "list.txt",)
    assert ConsentConfig.model_validate({"opt_out_domains": "list.txt"}) == consent
    assert ConsentConfig.model_validate_json(consent.model_dump_json()) == consent


@given(st.text(max_size=40))
def test_any_text_is_a_domain_or_none(text: str) -> None:
    name = domain_name(text)
    assert name.isascii()
    assert domain_name(name) == name


def test_the_fingerprint_follows_the_lists(lists: ConsentConfig) -> None:
    config = CleanConfig(consent=lists)
    before = fingerprint(config)
    assert before == fingerprint(config) != fingerprint(CleanConfig())
    with lists.opt_out_domains[0].open("a") as file:
        file.write("one.more\n")
    assert fingerprint(config) != before
    lists.opt_out_domains[0].unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        fingerprint(config)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("a plain caption", "a plain caption"),
        ("Tom &amp; Jerry", "Tom & Jerry"),
        ("Tom &amp;amp; Jerry &quot;live&quot;", 'Tom & Jerry "live"'),
        ("<p>a <b>bold</b><br/>cat</p>", "a bold cat"),
        ("&lt;b&gt;a cat&lt;/b&gt;", "a cat"),
        ("a cat<script>alert(1)</script> sits<!-- not shown -->", "a cat sits"),
        ("I <3 cats, 2 < 3 and 5 > 4", "I <3 cats, 2 < 3 and 5 > 4"),
        ("a\u200b cat\ufeff with\u00ad out", "a cat with out"),
        ("evil \u202egnp.exe\u202c", "evil gnp.exe"),
        ("bell\a and\x1b[31m red", "bell and [31m red"),
        ("cafe\u0301", "caf\u00e9"),
        ("family \U0001f468\u200d\U0001f469\u200d\U0001f467 heart \u2764\ufe0f", None),
        ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", None),  # Persian, with the joiner it needs
        ("\u200da\u200d cat\u200d", "a cat"),
        ("seen\U000e0041\U000e0042\ue000", "seen"),
        ("&nbsp;&#8203;a&nbsp;cat", "a cat"),
        ("&#xD800; &#0; x", "\ufffd \ufffd x"),
    ],
)
def test_captions_become_what_is_seen(raw: str, clean: str | None) -> None:
    assert clean_caption(raw, CaptionConfig()) == (raw if clean is None else clean)


@given(st.text(max_size=200))
def test_a_clean_caption_is_one_visible_line(text: str) -> None:
    clean = clean_caption(text, CaptionConfig(max_letters=50))
    assert clean == " ".join(clean.split())
    assert len(clean) <= 50
    assert unicodedata.is_normalized("NFC", clean) or len(clean) == 50
    assert not {unicodedata.category(letter) for letter in clean} & {"Cc", "Co", "Cs"}


def test_links_go_when_that_is_asked_for() -> None:
    raw = "see https://example.com/a?b=c or www.example.org, mail me.too+x@mail.example.com now"
    assert clean_caption(raw, CaptionConfig()) == raw
    assert clean_caption(raw, CaptionConfig(drop_links=True)) == "see or mail now"
    assert clean_caption("3.5 @ noon", CaptionConfig(drop_links=True)) == "3.5 @ noon"


def test_long_captions_are_cut_after_a_word() -> None:
    assert clean_caption("one two three", CaptionConfig(max_letters=9)) == "one two"
    assert clean_caption("one two three", CaptionConfig(max_letters=7)) == "one two"
    assert clean_caption("oneandonly", CaptionConfig(max_letters=4)) == "onea"


@pytest.mark.parametrize("part", ["<!--", "<script>", "<a ", "&amp;", "a.", "a@", "\u200d", "www."])
def test_endless_markup_costs_no_square(part: str) -> None:
    assert len(clean_caption(part * 250_000, CaptionConfig(drop_links=True))) <= 2000


def captioned(caption: str | None, **options: object) -> Judgement:
    return judged({"caption": caption}, CleanConfig(captions=CaptionConfig.model_validate(options)))


def test_the_caption_that_came_is_kept_where_cleaning_changed_it() -> None:
    assert captioned("<b>cat</b>").fields == {"caption": "cat", "caption_original": "<b>cat</b>"}
    assert captioned("cat").fields == {"caption": "cat"}
    assert captioned("<b>cat</b>", keep_original=False).fields == {"caption": "cat"}
    assert captioned("<b>cat</b>", clean=False).fields == {"caption": "<b>cat</b>"}


def test_captions_may_be_required_and_have_a_length() -> None:
    assert captioned("").finding is None
    assert captioned("cat", min_letters=3).finding is None
    assert captioned("", min_letters=3).finding is None
    short = captioned("<i>ca</i>", min_letters=3).finding
    assert short is not None
    assert (short.rule, short.value, short.threshold) == ("caption_too_short", 2, 3)
    for empty in ("", None, "<br>", "\u200b"):
        missing = captioned(empty, require=True).finding
        assert missing is not None
        assert missing.rule == "no_caption"
    assert captioned("cat", require=True).finding is None
