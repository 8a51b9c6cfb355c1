"""Strangers' URLs, against a real server: nothing they do costs more than the limits, or reaches where it must not."""

import datetime
import ipaddress
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.training.data.servers import Strangers, strangers
from training.data.addresses import AddressRefusedError, Resolve, check, is_public, resolve
from training.data.download import Downloader, _retry_after_s, download, is_picture, opted_out
from training.data.download_config import DownloadConfig
from training.data.findings import Finding, RefusedError
from training.data.hosts import Hosts

pytestmark = pytest.mark.timeout(60)

Encode = Callable[..., bytes]
HERE = DownloadConfig(
    allow_networks=("127.0.0.2/32",), read_timeout_s=0.4, total_timeout_s=20, retries=1, retry_wait_s=0.01
)


@pytest.fixture(scope="module")
def server(encode: Encode) -> Iterator[Strangers]:
    with strangers(encode(1)) as running:
        yield running


def _get(url: str, config: DownloadConfig = HERE, lookup: Resolve = resolve, max_bytes: int = 10_000_000) -> bytes:
    with closing(Downloader(config, lookup)) as downloader:
        return downloader.get(url, max_bytes)


def _refusal(url: str, config: DownloadConfig = HERE, lookup: Resolve = resolve, max_bytes: int = 10**7) -> Finding:
    with pytest.raises(RefusedError) as refused:
        _get(url, config, lookup, max_bytes)
    return refused.value.finding


def test_a_picture_is_fetched_whatever_the_server_calls_it(server: Strangers) -> None:
    for path in ("/good.png", "/fine", "/long", "/redirect?to=/good.png#part"):
        assert download(server.url(path), HERE, 10_000_000) == server.picture
    assert all("Darkroom" in agent for agent in server.agents)


@pytest.mark.parametrize("path", ["/noai", "/list", "/agent", "/second"])
def test_who_says_no_is_obeyed(path: str, server: Strangers) -> None:
    assert _refusal(server.url(path)).rule == "opted_out_noai"
    assert _refusal(server.url(f"/redirect?to={path}")).rule == "opted_out_noai"
    heedless = HERE.model_copy(update={"obey_noai": False})
    assert _get(server.url(path), heedless) == server.picture


@given(st.lists(st.sampled_from(["noindex", "bot: noindex", "max-snippet: 3", "noaix", "a: b: c", ""]), max_size=4))
def test_other_words_are_no_refusal(words: list[str]) -> None:
    headers = [(b"X-Robots-Tag", word.encode()) for word in words]
    assert not opted_out([*headers, (b"x-robots-tag", ", ".join(words).encode()), (b"X-Other", b"noai")])
    assert opted_out([*headers, (b"x-ROBOTS-tag", ", ".join([*words, "NoAI"]).encode())])


@pytest.mark.parametrize(
    ("path", "rule", "words"),
    [
        ("/loop", "too_many_redirects", "still redirected after 5"),
        ("/nowhere", "download_failed", "redirected to nowhere"),
        ("/missing", "download_failed", "404"),
        ("/broken", "download_failed", "500"),
        ("/html", "not_a_picture", "image/png"),
        ("/packed", "download_failed", "gzip"),
        ("/closed", "download_failed", "429"),
        ("/short", "download_failed", ""),
        ("/huge", "download_too_large", "the server says"),
        ("/silent", "download_timeout", ""),
        ("/redirect?to=ftp://example.org/a.png", "bad_url", "only http and https"),
        ("/redirect?to=file:///etc/passwd", "bad_url", "only http and https"),
        ("/redirect?to=http://name:secret@127.0.0.2/", "bad_url", "a name or password"),
        ("/redirect?to=http://[::1", "bad_url", "not a URL"),
        ("/redirect?to=http://127.0.0.2:99999/", "bad_url", "Port out of range"),
        ("/redirect?to=http://xn--a/", "bad_url", "not a URL"),
    ],
)
def test_every_failure_has_a_rule_of_its_own(path: str, rule: str, words: str, server: Strangers) -> None:
    finding = _refusal(server.url(path))
    assert (finding.rule, words in finding.detail) == (rule, True), finding
    assert "secret" not in finding.detail


def test_an_endless_body_is_stopped_at_the_limit(server: Strangers) -> None:
    finding = _refusal(server.url("/endless"), max_bytes=300_000)
    assert (finding.rule, finding.threshold) == ("download_too_large", 300_000)
    assert finding.value is not None
    assert finding.value < 600_000


@pytest.mark.parametrize("path", ["/drip", "/drip-headers"])
def test_a_server_that_drips_is_left_at_the_total_limit(path: str, server: Strangers) -> None:
    config = HERE.model_copy(update={"total_timeout_s": 0.5})  # each byte comes well within ``read_timeout_s``
    finding = _refusal(server.url(path), config)
    assert (finding.rule, finding.threshold) == ("download_timeout", 0.5)


@pytest.mark.parametrize("path", ["/busy", "/busy-2?plain=1", "/short-once"])
def test_a_failure_that_passes_is_tried_again(path: str, encode: Encode) -> None:
    with strangers(encode(2)) as server:
        url = server.url(path.replace("-2", ""))
        assert _get(url) == server.picture
        assert sum(server.asked.values()) == 2
        assert _refusal(server.url("/broken")).value == 500
        assert server.asked["/broken"] == 2
        assert _refusal(server.url("/missing")).value == 404
        assert server.asked["/missing"] == 1  # that will not pass


def test_how_long_a_server_asks_to_be_left_alone() -> None:
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=90)
    text = soon.strftime("%a, %d %b %Y %H:%M:%S GMT").encode()
    assert 60 < (_retry_after_s([(b"Retry-After", text)]) or 0) <= 90
    assert _retry_after_s([(b"retry-after", b"7")]) == 7
    assert _retry_after_s([(b"retry-after", b"Wed, 21 Oct 2015 07:28:00 GMT")]) == 0
    assert [_retry_after_s([(b"retry-after", text)]) for text in (b"soon", b"", b"-3", b"\xff")] == [None] * 4
    beyond = (b"1 Jan 99999999999999999999 00:00:00 GMT", b"Mon, 1 Jan 2026 00:00:00 +99999999999999999999")
    assert [_retry_after_s([(b"retry-after", text)]) for text in beyond] == [None, None]


def test_few_downloads_from_one_host_at_once(encode: Encode) -> None:
    downloader = Downloader(HERE.model_copy(update={"per_host": 2, "read_timeout_s": 30}))
    with closing(downloader), strangers(encode(3)) as server, ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda _: downloader.get(server.url("/together"), 10_000_000), range(8))
        assert list(found) == [server.picture] * 8  # each handler waits for a second one: two do run at once
        assert server.most_active == 2
        assert not downloader._hosts._active


def test_of_hosts_that_asked_for_rest_only_those_that_still_rest_are_remembered() -> None:
    hosts = Hosts(2)
    for number in range(100):
        hosts.pause(f"{number}.example", 0.0)
    hosts.pause("last.example", 60.0)
    assert len(hosts._pauses) == 1


# --- addresses ---

PRIVATE = [
    *("127.0.0.1", "0.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.100.100.200"),
    *("168.63.129.16", "192.0.0.192", "224.0.0.1", "240.0.0.1", "255.255.255.255", "198.18.0.1", "192.0.2.1"),
    *("0.0.0.0", "::", "::1", "fe80::1", "fc00::1", "fd00:ec2::254", "ff02::1", "fec0::1", "2001:db8::1", "3fff::1"),  # noqa: S104
    *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "::127.0.0.1"),
]


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_on_the_open_internet(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    with pytest.raises(AddressRefusedError, match="not on the open internet"):
        check("example.org", ["1.1.1.1", address], [])  # one bad address is enough


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "::ffff:8.8.8.8"])
def test_addresses_that_are(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))
    assert check("example.org", [address, address], []) == [address]


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_is_judged_alike_however_it_is_spelled(address: ipaddress.IPv4Address) -> None:
    number = int(address)
    spellings = [
        ipaddress.IPv6Address((0xFFFF << 32) | number),
        ipaddress.IPv6Address((0x0064FF9B << 96) | number),
        ipaddress.IPv6Address((0x2002 << 112) | (number << 80)),
    ]
    assert {is_public(each) for each in spellings} == {is_public(address)}


@pytest.mark.parametrize(
    "url", ["http://{}:{port}/good.png", "http://2130706434:{port}/good.png", "http://0x7f.2:{port}/good.png"]
)
def test_private_addresses_are_refused_unless_allowed(url: str, server: Strangers) -> None:
    url = url.format("127.0.0.2", port=server.server_port)
    asked = server.asked.total()
    assert _refusal(url, DownloadConfig()).rule == "address_refused"
    assert server.asked.total() == asked, "nothing was sent"
    assert _get(url) == server.picture


@pytest.mark.parametrize("target", ["http://127.0.0.1:{port}/", "http://localhost:{port}/", "http://[::1]:{port}/"])
def test_a_redirect_into_the_private_network_is_refused(target: str, server: Strangers, encode: Encode) -> None:
    with strangers(encode(4), "127.0.0.1") as inside:
        url = server.url(f"/redirect?to={quote(target.format(port=inside.server_port))}")
        assert _refusal(url).rule == "address_refused"
        assert not inside.asked


def test_a_name_is_looked_up_once_and_kept_as_the_host(server: Strangers) -> None:
    answers = [["127.0.0.2"], ["127.0.0.1"]]
    looked_up = []

    def rebinding(host: str, port: int) -> list[str]:  # a name server that says another address the second time
        looked_up.append(host)
        return answers[min(len(looked_up), 2) - 1]

    name = f"pictures.example:{server.server_port}"
    assert _get(f"http://{name}/good.png", HERE, rebinding) == server.picture
    assert looked_up == ["pictures.example"]
    assert server.hosts[-1] == name
    assert _refusal(f"http://{name}/good.png", HERE, rebinding).rule == "address_refused"


def test_a_name_that_hangs_or_is_not_known() -> None:
    over = threading.Event()

    def hanging(_host: str, _port: int) -> list[str]:
        over.wait(30)
        return []

    config = HERE.model_copy(update={"connect_timeout_s": 0.05, "retries": 0})
    try:
        assert _refusal("http://slow.example/a.png", config, hanging).rule == "download_timeout"
    finally:
        over.set()
    finding = _refusal("http://nowhere.invalid/a.png", config.model_copy(update={"connect_timeout_s": 10.0}))
    assert (finding.rule, "nowhere.invalid is not known" in finding.detail) == ("download_failed", True)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the name localhost and no other."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "localhost.pem"
    plain = serialization.NoEncryption()
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    path.write_bytes(secret + made.public_bytes(serialization.Encoding.PEM))
    return path


def test_tls_checks_the_name_and_not_the_pinned_address(
    certificate: Path, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with strangers(encode(5), context=context) as server:
        lookup = lambda _host, _port: ["127.0.0.2"]  # noqa: E731
        url = f"https://localhost:{server.server_port}/good.png"
        with pytest.raises(RefusedError, match="certificate"):  # nobody vouches for it
            _get(url, HERE, lookup)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert _get(url, HERE, lookup) == server.picture
        with pytest.raises(RefusedError, match="certificate"):
            _get(url.replace("localhost", "other.example"), HERE, lookup)


def test_proxies_of_the_environment_are_not_asked(server: Strangers, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert _get(server.url("/good.png")) == server.picture


def test_nobody_listening_is_a_failure() -> None:
    finding = _refusal("http://127.0.0.2:9/a.png")
    assert (finding.rule, "refused" in finding.detail) == ("download_failed", True)


@pytest.mark.parametrize(
    "url",
    [
        *("", "a.png", "/etc/passwd", "s3://bucket/a.png", "http://", "http:///a.png", "http://u:p@h/", "x" * 9000),
        *("http://127.0.0.2:99999/", "http://127.0.0.2:-1/", "http://xn--a/", "https://xn--\u00e4/a.png"),
    ],
)
def test_what_is_no_url_is_not_asked(url: str) -> None:
    finding = _refusal(url)
    assert finding.rule == "bad_url"
    assert "u:p" not in finding.detail


@given(st.text())
def test_no_text_is_fatal(url: str) -> None:
    downloader = Downloader(DownloadConfig(retries=0), lambda _host, _port: ["127.0.0.1"])  # never connects
    for text in (url, f"http://{url}", f"http://h/{url}"):
        with pytest.raises(RefusedError) as refused:
            downloader.get(text, 1000)
        assert refused.value.finding.rule in {"bad_url", "address_refused", "download_failed"}


def test_pictures_are_known_by_their_first_bytes(encode: Encode) -> None:
    assert all(is_picture(encode(1, kind=kind)[:16]) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP"))
    assert not any(is_picture(data) for data in (b"", b"<html>", b"%PDF-1.7", b"\x80\x04cos\n", b"\x1f\x8b\x08"))


def test_a_network_that_is_none_is_refused() -> None:
    with pytest.raises(ValidationError, match="does not appear to be an IPv4 or IPv6 network"):
        DownloadConfig(allow_networks=("intranet",))
