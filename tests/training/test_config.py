"""Recipes: what is read, what an override means, and that every mistake is told in words that mend it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from training.config import TrainConfig, load_recipe, override, parse
from training.errors import ConfigError, DarkroomError
from training.optim import CosineSchedule, WarmupStableDecay
from training.recipe_files import recipe_names

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a recipe; returns its path."""

    def written(text: str, name: str = "mine.yaml") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return written


def refusal(reference: str, *overrides: str) -> str:
    """The text of the error that loading gives."""
    with pytest.raises(ConfigError) as caught:
        load_recipe(reference, overrides)
    assert caught.value.exit_code == 2
    assert str(caught.value) == caught.value.as_text()
    return str(caught.value)


@pytest.mark.parametrize("name", sorted({*recipe_names()} - {"finetune"}))
def test_every_packaged_recipe_is_valid(name: str) -> None:
    config = load_recipe(name)
    assert parse(config.model_dump(mode="json")) == config, "a dumped recipe is the recipe"


def test_the_packaged_recipes_are_these() -> None:
    assert recipe_names() == ["base", "dit-tiny", "dit-xl-2", "finetune", "smileys"]


def test_finetune_is_refused_without_a_pipeline_to_start_from() -> None:
    assert refusal("finetune").startswith("finetune: start.pipeline is not valid.\n  value:   ''")


def test_a_recipe_starts_from_its_base_and_from_its_bases_base(write: Write) -> None:
    below = write("base: smileys\nseed: 5\nmodel: {widths: [16, 32, 64]}\n", "below.yaml")
    config = load_recipe(write(f"base: {below}\nsteps: 7\nmodel: {{head_width: 16}}\n"))
    smileys = load_recipe("smileys")
    assert (config.seed, config.steps) == (5, 7)
    assert config.model.widths == (16, 32, 64), "of the base"
    assert config.model.head_width == 16, "its own"
    assert config.model.attention == smileys.model.attention, "of the base's base, in the same section"
    assert config.evaluation.prompts == smileys.evaluation.prompts
    assert config.optimizer.learning_rate == 2e-3


def test_what_is_not_said_has_its_default(write: Write) -> None:
    assert load_recipe(write("data: {path: here}")) == TrainConfig.model_validate({"data": {"path": "here"}})


@pytest.mark.parametrize(
    ("assignment", "section", "field", "value"),
    [
        ("optimizer.learning_rate=1e-3", "optimizer", "learning_rate", 1e-3),
        ("optimizer.learning_rate=2E-4", "optimizer", "learning_rate", 2e-4),
        ("optimizer.learning_rate=0.5", "optimizer", "learning_rate", 0.5),
        ("model.widths=[8, 16, 24]", "model", "widths", (8, 16, 24)),
        ("engine.micro_batch=null", "engine", "micro_batch", None),
        ("engine.micro_batch=16", "engine", "micro_batch", 16),
        ("data.path=/a=b", "data", "path", "/a=b"),
        ("data.path= spaced out ", "data", "path", "spaced out"),
        (" ema.decay =0.5", "ema", "decay", 0.5),
        ("evaluation.prompts=[a cat, b]", "evaluation", "prompts", ("a cat", "b")),
    ],
)
def test_an_override_is_yaml_and_a_number_is_a_number(assignment: str, section: str, field: str, value: object) -> None:
    config = load_recipe("base", ["model.head_width=8", assignment])
    found = getattr(getattr(config, section), field)
    assert found == value
    assert type(found) is type(value)


def test_overrides_come_one_after_the_other() -> None:
    assert load_recipe("base", ["seed=1", "seed=2", "name=x"]).seed == 2
    assert load_recipe("base").seed == 0, "and leave no trace"


def test_an_override_makes_the_section_it_needs() -> None:
    values: dict[str, object] = {"a": 1}
    override(values, "a.b.c", 2)
    override(values, "a.b.d", 3)
    assert values == {"a": {"b": {"c": 2, "d": 3}}}


def test_a_whole_section_can_be_replaced() -> None:
    config = load_recipe("smileys", ["schedule={kind: cosine, floor: 0.1}"])
    assert config.schedule == CosineSchedule(floor=0.1)
    assert isinstance(load_recipe("smileys").schedule, WarmupStableDecay)


def test_an_unknown_recipe_names_those_that_are() -> None:
    text = refusal("smiley")
    assert "There is no such recipe." in text
    assert "value:   'smiley'" in text
    assert f"options: {', '.join(recipe_names())}" in text
    assert "'/nowhere/x.yaml'" in refusal("/nowhere/x.yaml")


def test_an_unknown_base_is_named(write: Write) -> None:
    assert "value:   'nothing'" in refusal(write("base: nothing"))


def test_an_unknown_key_shows_its_path_and_what_there_is(write: Write) -> None:
    text = refusal("base", "optimizer.learning_rat=0.1")
    assert "unknown key optimizer.learning_rat." in text
    assert "value:   0.1" in text
    assert "options: beta1, beta2, epsilon, kind, learning_rate, weight_decay" in text
    text = refusal("base", "stpes=3")
    assert "unknown key stpes." in text
    assert "global_batch" in text
    assert "schedule" in text
    text = refusal(write("data: {}\nmodle: {resolution: 8}"))
    assert "mine.yaml: unknown key modle." in text


def test_an_unknown_key_of_a_chosen_member_lists_that_members_keys() -> None:
    text = refusal("base", "schedule={kind: cosine, decay_share: 0.5}")
    assert "unknown key schedule." in text
    assert "decay_share." in text
    assert "options: floor, kind, warmup_steps" in text


def test_an_unknown_kind_lists_the_kinds() -> None:
    text = refusal("base", "schedule.kind=linear")
    assert "schedule is not valid" in text
    assert "'linear'" in text
    for kind in ("constant", "cosine", "wsd"):
        assert f"'{kind}'" in text
    text = refusal("base", "model.family=vit")
    assert "model is not valid" in text
    assert "'vit'" in text
    for family in ("unet", "dit", "sd3", "pixart"):
        assert f"'{family}'" in text


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("steps=many", ["steps is not valid", "'many'", "valid integer"]),
        ("steps=0", ["steps is not valid", "0", "greater than or equal to 1"]),
        ("seed=-1", ["seed is not valid", "-1", "greater than or equal to 0"]),
        ("ema.decay=1", ["ema.decay is not valid", "less than 1"]),
        ("optimizer.learning_rate=-1e-3", ["optimizer.learning_rate", "-0.001", "greater than 0"]),
        ("engine.zero_stage=4", ["engine.zero_stage", "4", "0, 1, 2 or 3"]),
        ("engine.precision=fp64", ["engine.precision", "'fp64'", "'auto', 'bf16', 'fp16', 'fp32' or 'fp8'"]),
        ("name=a/b", ["name is not valid", "'a/b'", "pattern"]),
        ("model=big", ["model is not valid", "'big'"]),
        ("model.resolution=null", ["model.resolution", "valid integer"]),
        ("schedule={kind: wsd, decay_share: 2}", ["decay_share", "2", "less than or equal to 1"]),
    ],
)
def test_a_wrong_type_or_range_shows_the_path_the_value_and_the_rule(assignment: str, words: list[str]) -> None:
    text = refusal("base", assignment)
    for word in words:
        assert word in text


def test_several_mistakes_are_counted() -> None:
    assert "(and 1 more)" in refusal("base", "steps=0", "seed=-1")


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("model.attention=[true]", "widths names 3 levels, attention 1: one entry each"),
        ("model.resolution=30", "resolution 30 must be a multiple of 4 for 3 levels"),
        ("model.widths=[32, 64, 100]", "width 100 must be a multiple of norm_groups 8 and of head_width 32"),
        ("model.widths=[30, 64, 128]", "width 30 must be a multiple of norm_groups 8"),
    ],
)
def test_levels_that_do_not_fit_are_told_in_numbers(assignment: str, words: str) -> None:
    text = refusal("base", assignment)
    assert "model is not valid" in text
    assert words in text
    assert "Value error" not in text


@pytest.mark.parametrize(
    ("overrides", "sizes"),
    [
        ((), (1, 1)),
        (("workers.count=3", "engine.micro_batch=48"), (3, 3)),
        (("workers.count=64",), (64, 64)),
        (("workers.min=2", "workers.max=5"), (2, 5)),
        (("workers.min=4", "workers.max=4"), (4, 4)),
        (("workers.count=null", "workers.min=1", "workers.max=2"), (1, 2)),
    ],
)
def test_workers_are_a_number_or_a_range_and_need_not_divide_the_batch(
    overrides: tuple[str, ...], sizes: tuple[int, int]
) -> None:
    config = load_recipe("base", overrides)
    workers = config.workers
    assert (workers.smallest, workers.largest) == sizes
    assert workers.elastic == any("workers.min" in assignment for assignment in overrides)
    assert parse(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("workers.count=65",), "global_batch 64 must be at least 65, a row for each worker"),
        (("workers.min=1", "workers.max=65"), "global_batch 64 must be at least 65, a row for each worker"),
        (("workers.min=3", "workers.max=2"), "min 3 must be at most max 2"),
        (("workers.min=2",), "min and max come together: the fewest and the most workers"),
        (("workers.max=2",), "min and max come together"),
        (
            ("workers.count=2", "workers.min=1", "workers.max=2"),
            "either count, a fixed number of workers, or min and max; count=null takes count away",
        ),
        (("workers.min=0", "workers.max=2"), "Input should be greater than or equal to 1"),
    ],
)
def test_numbers_of_workers_that_make_no_sense_are_refused(overrides: tuple[str, ...], words: str) -> None:
    assert words in refusal("base", *overrides)


def test_bases_in_a_circle_are_refused(write: Write, tmp_path: Path) -> None:
    write(f"base: {tmp_path / 'b.yaml'}", "a.yaml")
    write(f"base: {tmp_path / 'a.yaml'}", "b.yaml")
    text = refusal(str(tmp_path / "a.yaml"))
    assert "its own base" in text
    assert "bases form a chain that ends" in text
    assert "its own base" in refusal(write(f"base: {tmp_path / 'mine.yaml'}"))


def test_what_is_not_yaml_is_refused_with_the_place(write: Write) -> None:
    text = refusal(write("steps: [1, 2\nname: x\n"))
    assert "The recipe is not YAML" in text
    assert "line 2" in text
    assert "mine.yaml" in text
    assert "The recipe is not a mapping." in refusal(write("- steps\n- 3\n"))


@pytest.mark.parametrize("assignment", ["steps", "=3", ""])
def test_an_override_without_key_or_value_is_refused(assignment: str) -> None:
    text = refusal("base", assignment)
    assert "rule:    section.key=value" in text


def test_an_override_that_is_not_yaml_is_refused() -> None:
    assert "'steps=[1'" in refusal("base", "steps=[1")


def test_nothing_unsafe_is_constructed_from_yaml(write: Write, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    text = refusal(write(f"steps: !!python/object/apply:pathlib.Path.touch ['{trace}']"))
    assert "The recipe is not YAML" in text
    assert not trace.exists()


def test_a_missing_section_is_told() -> None:
    with pytest.raises(ConfigError, match=r"recipe: data is not valid") as caught:
        parse({})
    assert "Field required" in str(caught.value)


def test_errors_are_darkroom_errors_that_chain_nothing() -> None:
    with pytest.raises(DarkroomError) as caught:
        load_recipe("base", ["steps=0"])
    assert caught.value.__suppress_context__, "pydantic's own error would be shown twice"


def test_recipes_are_read_without_torch() -> None:
    code = (
        "import sys; import training.config as c; c.load_recipe('smileys');"
        "heavy = {'torch', 'ray', 'deepspeed', 'mlflow', 'diffusers', 'transformers'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
