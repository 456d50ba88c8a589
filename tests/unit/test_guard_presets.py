"""What signs mean: the shipped presets, an operator's file, and what is wrong with that."""

from __future__ import annotations

from pathlib import Path

import pytest

from sempervirt.core.errors import InvalidRequest
from sempervirt.guard.presets import Afterwards, Meaning, ModulePolicy, Rule, above, load, shipped
from sempervirt.guard.signs import SignId

DOCUMENTS = Path(__file__).parents[2] / "docs"


def test_every_sign_has_a_meaning_as_shipped() -> None:
    presets = shipped()
    assert set(presets.rules) == set(SignId)
    assert presets.files == ("presets.toml",)


def test_what_the_module_put_off_evacuates_and_a_busy_host_does_not() -> None:
    rules = shipped().rules
    fatal = {sign for sign in SignId if sign.of_module} - {SignId.MODULE_WARNING}
    assert {rules[sign].meaning for sign in fatal} == {Meaning.EVACUATE}
    busy = [sign for sign in SignId if sign.value.startswith("pressure.")]
    assert {rules[sign].meaning for sign in busy} == {Meaning.WATCH}


def test_the_evacuation_is_over_before_the_modules_own_deadline() -> None:
    assert shipped().deadline_s < 300


def test_an_operators_file_overrides_single_lines(tmp_path: Path) -> None:
    file = tmp_path / "guard.toml"
    file.write_text(
        "version = 1\n[signs]\n"
        '"log.oops" = "watch"\n'
        '"log.warning" = { meaning = "evacuate", at_least = 5, within_s = 60, '
        "load_module = true }\n"
        '[module]\npolicy = "lenient"\nafterwards = "stay"\n[shutdown]\nhold_s = 0\n'
        "[evacuation]\ndeadline_s = 9\nretry_after_s = 2.5\nattempts = 1\n"
    )
    presets, base = load(file), shipped()
    assert presets.rules[SignId.LOG_OOPS] == Rule(Meaning.WATCH)
    assert presets.rules[SignId.LOG_WARNING] == Rule(Meaning.EVACUATE, 5, 60.0, load_module=True)
    assert presets.rules[SignId.MODULE_PANIC] == base.rules[SignId.MODULE_PANIC]
    assert (presets.module_policy, presets.afterwards) == (ModulePolicy.LENIENT, Afterwards.STAY)
    assert (presets.hold_s, presets.deadline_s) == (0.0, 9.0)
    assert (presets.retry_after_s, presets.attempts) == (2.5, 1)
    assert presets.files == ("presets.toml", str(file))


def test_without_an_operators_file_the_shipped_presets_are_in_force(tmp_path: Path) -> None:
    assert load(tmp_path / "none") == shipped()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "version: None"),
        ("version = 2", "version: 2"),
        ("version = 1\n[signs]\n\"log.oops\" = \"evakuate\"",
         "signs.\"log.oops\": 'evakuate' is none"),
        ("version = 1\n[signs]\n\"log.ops\" = \"watch\"", 'signs."log.ops": there is no such key'),
        ("version = 1\n[signs]\n\"log.oops\" = 3", 'signs."log.oops": 3 is no table'),
        ("version = 1\n[signs]\n\"log.oops\" = { at_least = 2 }", "meaning: is missing"),
        ("version = 1\n[signs]\n\"log.oops\" = { meaning = \"watch\", at_least = 0 }",
         'signs."log.oops".at_least: 0 is not between 1 and 1000'),
        ("version = 1\n[signs]\n\"log.oops\" = { meaning = \"watch\", at_least = true }",
         "True is no number"),
        ("version = 1\n[signs]\n\"log.oops\" = { meaning = \"watch\", at_least = 1.5 }",
         "1.5 is no whole number"),
        ("version = 1\n[signs]\n\"log.oops\" = { meaning = \"watch\", load_module = 1 }",
         "1 is neither true nor false"),
        ("version = 1\n[signs]\n\"log.oops\" = { meaning = \"watch\", within_s = nan }",
         "nan is not between"),
        ("version = 1\nsigns = 7", "signs: 7 is no table"),
        ("version = 1\n[evacuation]\ndeadline_s = inf", "evacuation.deadline_s: inf"),
        ("version = 1\n[evacuation]\nattempt = 1", 'evacuation."attempt": there is no such key'),
        ("version = 1\n[module]\npolicy = \"brave\"", "module.policy: 'brave' is none of: observe"),
        ("version = 1\n[module]\nafterwards = \"go\"",
         "module.afterwards: 'go' is none of: let-go"),
        ("version = 1\n[shutdown]\nhold_s = -1", "shutdown.hold_s: -1"),
        ("version 1", "not TOML"),
        ("version = 1\nx = " + "[" * 5000, "not TOML"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_file_key_and_value(text: str, said: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        above(shipped(), text, "/etc/sempervirt/guard.toml")
    assert "/etc/sempervirt/guard.toml" in str(caught.value)
    assert said in str(caught.value)


def test_a_file_that_is_too_long_or_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "guard.toml"
    for content in (b"#" * (300 << 10), b"\xff\xfe"):
        file.write_bytes(content)
        with pytest.raises(InvalidRequest, match=r"guard\.toml"):
            load(file)


def test_a_file_that_cannot_be_looked_at_is_refused_and_ends_no_agent(tmp_path: Path) -> None:
    loop = tmp_path / "guard.toml"
    loop.symlink_to(loop)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        load(loop)
    long = tmp_path / ("x" * 300)  # the kernel does not even look for such a name
    with pytest.raises(InvalidRequest, match="cannot be read"):
        load(long)


def test_the_operations_page_names_every_meaning() -> None:
    text = (DOCUMENTS / "operations.md").read_text()
    page = text.partition("## Host guard")[2]
    assert all(f"`{meaning.value}`" in page for meaning in Meaning)
