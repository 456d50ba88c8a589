"""Results: rows, files, documents, the check."""

from dataclasses import replace
from pathlib import Path

import pytest

from bench import markdown, parity, plot
from bench.backends import (
    CONTRIB,
    BackendError,
    Blkd,
    Peer,
    QemuStorageDaemon,
    blkd_variants,
    contrib,
    running,
)
from bench.cases import BY_NAME, PARITY
from bench.driver import pinned
from bench.kept import KeptError
from bench.load import Figures, LoadError, arguments, figures
from bench.results import Results, Row, Sample
from bench.sections import BENCH, COST, IDLE, MIGRATE, SCALE, MarkersError, Section
from bench.storages import Storage, StorageError, file_system, prepared
from bench.suites import SUITES

MEASUREMENTS = Path(__file__).parents[2] / "docs/reference/measurements"
FIGURES = Figures(
    iops=1000.0, mb_per_s=4.0, mean_us=10.0, p50_us=10.0, p90_us=11.0, p99_us=20.0, p999_us=30.0,
    max_us=40.0, cpu_us=5.0, switches=1.0, own_cpu_us=1.0, kicks=1.0, sleeps=1.0, ios=1000,
    inflight=False,
)  # fmt: skip


def sample(number: int, case: str, backend: str, factor: float, storage: str = "tmpfs") -> Sample:
    """A measurement `factor` times as fast as the reference's."""
    seen = replace(FIGURES, iops=1000 * factor, p50_us=10 / factor, cpu_us=5 / factor)
    return Sample(number, storage, case, backend, 0.5, seen)


def made(factor: float, rounds: int = 7) -> Results:
    """Results in which blkd is `factor` times as fast as the reference, in every parity case."""
    results = Results(
        reference="qsd-uring",
        machine={
            "date": "2026-11-22T20:00:00+00:00", "processor": "P", "processors": "2",
            "hypervisor": "kvm", "memory_mib": "2048", "kernel": "6.1", "qemu": "Q",
            "semper_blkd": "semper-blkd 0.1.0", "commit": "abc",
        },
        settings={"subject": "blkd", "rounds": rounds, "seconds": 1.0},
        labels={"tmpfs": "tmpfs", "direct": "ext4 O_DIRECT"},
        load_average=(0.5, 0.6),
    )  # fmt: skip
    for number in range(rounds):
        for storage in results.labels:
            for case in PARITY:
                drift = 1 + number / 3
                results.samples.append(sample(number, case.name, "blkd", factor * drift, storage))
                results.samples.append(sample(number, case.name, "qsd-uring", drift, storage))
    return results


def test_rows_put_the_reference_first() -> None:
    rows = [(row.storage, row.case, row.backend) for row in made(2).rows()]
    assert rows[:2] == [("tmpfs", "4k-read-d1", "qsd-uring"), ("tmpfs", "4k-read-d1", "blkd")]
    assert len(rows) == 16


def test_ratios_are_those_of_the_round() -> None:
    row = Row(made(2), "tmpfs", "4k-read-d1", "blkd")
    assert row.ratios("iops") == pytest.approx([2.0] * 7)
    assert row.ratios("p50_us") == pytest.approx([0.5] * 7)


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    results = made(2)
    results.samples.append(Sample(0, "tmpfs", "4k-read-d1", "blkd", 0.1, None, "it died"))
    results.write(tmp_path / "r.json")
    assert Results.read(tmp_path / "r.json") == results


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    for text in ("{}", "[", '{"version": 0}'):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(KeptError):
            Results.read(tmp_path / "r.json")


def test_the_document_stands_between_the_markers(tmp_path: Path) -> None:
    path = tmp_path / "disks.md"
    path.write_text(f"head\n{BENCH.begin}\nold\n{BENCH.end}\ntail\n")
    BENCH.write(path, markdown.document(made(2)))
    BENCH.write(path, markdown.document(made(2)))
    text = path.read_text()
    assert text.startswith("head\n")
    assert text.endswith("\ntail\n")
    assert "old" not in text
    assert "| 4k-read-d1 | blkd | 3 000" not in text.split("tmpfs")[0]
    assert "2.00 (2.00–2.00)" in text
    assert text.count("**ext4 O_DIRECT**") == 1


def test_a_document_without_markers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disks.md"
    path.write_text("nothing\n")
    with pytest.raises(MarkersError):
        BENCH.write(path, markdown.document(made(2)))


def test_failures_are_named_in_the_document() -> None:
    results = made(2)
    results.samples.append(Sample(3, "tmpfs", "4k-read-d1", "blkd", 0.1, None, "it died"))
    assert "- tmpfs 4k-read-d1 blkd, round 3: it died" in markdown.document(results)


@pytest.mark.parametrize(
    ("value", "text"), [(1234567, "1 230 000"), (1000, "1 000"), (12.345, "12.3"), (0.5, "0.5")]
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert markdown.number(value) == text


def test_goals_say_whether_they_are_reached() -> None:
    seen = {(goal.label, case): cells for goal, case, cells in markdown.goal_rows(made(7))}
    cells = seen["tmpfs, depth 1", "4k-read-d1"]
    assert cells["iops"] == "7.00 (7.00–7.00) ≥ 6: reached"
    assert seen["tmpfs, depth 32, reads", "4k-read-d32"]["cpu_us"].endswith("missed")


def test_parity_passes_and_objects() -> None:
    assert list(parity.objections(made(1.1), "blkd")) == []
    assert list(parity.objections(made(1.0), "blkd")) == []
    slower = list(parity.objections(made(0.8), "blkd"))
    assert len(slower) == 2 * 4 * 2
    assert slower[0].startswith("tmpfs 4k-read-d1: iops is 0.80")


def test_parity_passes_nothing_that_was_not_measured() -> None:
    results = made(2)
    results.samples = [one for one in results.samples if one.storage != "direct"]
    assert list(parity.objections(results, "blkd")) == [
        f"direct {case.name}: not measured" for case in PARITY
    ]
    results = made(2)
    results.samples.append(Sample(0, "tmpfs", "4k-read-d1", "qsd-uring", 0.1, None, "it died"))
    assert any("it died" in objection for objection in parity.objections(results, "blkd"))


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    plot.draw(made(2), tmp_path / "plot.svg")
    assert (
        "4k-write-d32" in (tmp_path / "plot.svg").read_text()
        or (tmp_path / "plot.svg").stat().st_size > 10_000
    )


REPORT = {
    "version": 1,
    "latency_us": {"mean": 1, "p50": 2, "p90": 3, "p99": 4, "p99_9": 5, "max": 6},
    "flush_latency_us": {"p50": 15},
    "backend": {"cpu_us_per_io": 7, "switches_per_io": 8},
    "own": {"cpu_us_per_io": 9},
    "iops": 10, "mb_per_s": 11, "kicks_per_io": 12, "sleeps_per_io": 13, "ios": 14,
    "inflight": True,
}  # fmt: skip


def test_a_report_is_read() -> None:
    seen = figures(REPORT)
    assert (seen.p50_us, seen.p999_us, seen.cpu_us, seen.own_cpu_us) == (2, 5, 7, 9)
    assert seen.flush_us == 15
    with pytest.raises(LoadError):
        figures({**REPORT, "version": 2})


def storage(name: str, tmp_path: Path) -> Storage:
    """A storage that is only named."""
    direct, null = name == "direct", name == "null"
    return Storage(name, tmp_path / "a,b.img", 1 << 20, "ext4", direct=direct, null=null)


def test_commands_open_the_image_alike(tmp_path: Path) -> None:
    blkd, qsd = Blkd("blkd", ("p",)), QemuStorageDaemon("qsd-uring", "io_uring")
    socket = tmp_path / "s"
    assert "--direct" in blkd.command(storage("direct", tmp_path), 2, socket)
    assert "--direct" not in blkd.command(storage("cached", tmp_path), 2, socket)
    assert "--num-queues=2" in blkd.command(storage("cached", tmp_path), 2, socket)
    assert "cache.direct=on" in " ".join(qsd.command(storage("direct", tmp_path), 2, socket))
    assert "a,,b.img" in " ".join(qsd.command(storage("cached", tmp_path), 2, socket))
    assert "null-co" in " ".join(qsd.command(storage("null", tmp_path), 2, socket))
    assert "--engine=null" in blkd.command(storage("null", tmp_path), 1, socket)


def test_native_aio_serves_only_direct(tmp_path: Path) -> None:
    native = QemuStorageDaemon("qsd-native", "native")
    served = [name for name in ("tmpfs", "cached", "direct", "null")
              if native.serves(storage(name, tmp_path), 1)]  # fmt: skip
    assert served == ["direct"]


def test_engines_serve_what_they_can(tmp_path: Path) -> None:
    variants = {one.name: one for one in blkd_variants(("p",))}
    assert not variants["blkd-mmap"].serves(storage("direct", tmp_path), 1)
    assert variants["blkd-mmap"].serves(storage("tmpfs", tmp_path), 1)
    assert variants["blkd"].serves(storage("null", tmp_path), 1)
    assert not variants["blkd-sync"].serves(storage("null", tmp_path), 1)
    command = variants["bare"].command(storage("null", tmp_path), 1, Path("/s"))
    assert {"--no-inflight", "--no-map", "--engine=null"} <= set(command)


def test_the_second_peer_serves_one_queue_around_the_cache(tmp_path: Path) -> None:
    peer = contrib(tmp_path / "a b")
    names = ("tmpfs", "cached", "direct", "null")
    served = [name for name in names if peer.serves(storage(name, tmp_path), 1)]
    assert served == ["tmpfs", "direct"]
    assert not peer.serves(storage("tmpfs", tmp_path), 2)
    command = peer.command(storage("tmpfs", tmp_path), 1, Path("/s"))
    assert command[:2] == [f"{tmp_path}/a b", "--socket-path=/s"]


def test_each_suite_knows_its_backends_and_cases() -> None:
    peers = ["qsd-uring", "qsd-threads", "qsd-native", CONTRIB]
    known = {*peers, *(one.name for one in blkd_variants(("p",)))}
    for suite in SUITES.values():
        assert {suite.subject, suite.reference} <= set(suite.backends) <= known
        assert {goal.storage for goal in suite.goals} <= set(suite.storages)
        assert {case for goal in suite.goals for case in goal.cases} <= set(suite.cases)


@pytest.mark.parametrize(
    ("page", "sections"),
    [("disks", (BENCH, COST)), ("moves", (MIGRATE,)), ("fleet", (IDLE, SCALE))],
)
def test_every_section_has_its_place(page: str, sections: tuple[Section, ...]) -> None:
    text = (MEASUREMENTS / f"{page}.md").read_text()
    for section in sections:
        assert text.count(section.begin) == text.count(section.end) == 1


def test_a_peer_is_a_template(tmp_path: Path) -> None:
    peer = Peer("other", "prog --socket {socket} --file '{image}' -n {queues} --direct={direct}")
    command = peer.command(storage("direct", tmp_path), 3, Path("/s"))
    assert command == [
        "prog", "--socket", "/s", "--file", f"{tmp_path}/a,b.img", "-n", "3", "--direct=on",
    ]  # fmt: skip


def test_a_peer_may_be_limited(tmp_path: Path) -> None:
    peer = Peer("other", "prog", ("direct",))
    assert [peer.serves(storage(name, tmp_path), 1) for name in ("direct", "cached")] == [
        True,
        False,
    ]


def test_a_case_with_a_rate_asks_for_it() -> None:
    assert "--rate=20000" in arguments(BY_NAME["4k-read-20k"], Path("/s"), 1, 0, 1)
    plain = arguments(BY_NAME["4k-read-d32"], Path("/s"), 1, 0, 1)
    assert not any(word.startswith("--rate") for word in plain)


def test_pinning_gives_places() -> None:
    assert pinned(None, 0, ["p"]) == ["p"]
    assert pinned("apart", 1, ["p"])[2] == "1"
    assert pinned("together", 1, ["p"])[2] == "0"


def test_a_backend_that_ends_by_itself_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(BackendError, match="status 3: no such image"),
        running(["sh", "-c", "echo no such image; exit 3"], tmp_path / "log") as process,
    ):
        process.wait(90)


def test_a_missing_program_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(BackendError, match="No such file"),
        running(["/nonexistent"], tmp_path / "log"),
    ):
        pass


def test_images_are_written_and_removed(tmp_path: Path) -> None:
    size = 1 << 20
    with prepared(("null",), tmp_path, tmp_path, size) as (only,):
        assert only.image.stat().st_size == size
        assert only.image.stat().st_blocks * 512 >= size
        only.settle()
    assert list(tmp_path.iterdir()) == []


def test_a_place_of_the_wrong_kind_is_refused(tmp_path: Path) -> None:
    kind = file_system(tmp_path)
    assert kind not in {"unknown", ""}
    wrong = "direct" if kind == "tmpfs" else "tmpfs"
    with (
        pytest.raises(StorageError, match="choose another"),
        prepared((wrong,), tmp_path, tmp_path, 1 << 20),
    ):
        pass
