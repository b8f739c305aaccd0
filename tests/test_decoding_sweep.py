"""A sweep as one list of jobs: who does what next, any number of workers, progress over all of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from convexlm.decoding import CheckpointJobs, Search, decode_sweep
from convexlm.decoding import run as run_module
from convexlm.decoding.backends import Backend, Hypothesis
from convexlm.decoding.joblist import JobList
from convexlm.decoding.patience import LEAST_STEPS, Patience
from convexlm.decoding.progress import progress_lines
from convexlm.decoding.store import DecodeStore
from convexlm.decoding.task import Task
from convexlm.decoding.work import Batch, Engine, Load, Part, Sizes
from convexlm.errors import UserError
from convexlm.segments import read_hypotheses
from decoding_helpers import SOURCES, EchoBackend, fake_checkpoint, make_checkpoint, make_job, make_test_set, read

if TYPE_CHECKING:
    from convexlm.tokenization import PromptSettings

MANY = [f"{source} {word}" for word in ("house", "dog") for source in SOURCES]


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> EchoBackend:
    engine = EchoBackend()
    monkeypatch.setattr(run_module, "get_backend", lambda name: lambda: engine)
    return engine


def entries_in(folder: Path, checkpoints: list[Path], beams: tuple[int, ...] = (1, 3)) -> list[CheckpointJobs]:
    """Two directions and the given searches of every checkpoint."""
    entries = []
    for number, checkpoint in enumerate(checkpoints):
        jobs = []
        for pair in ("en-de", "de-en"):
            for count in beams:
                job = make_job(folder / f"{number}.{pair}.{count}.jsonl", num_beams=count, max_new_tokens=12)
                jobs.append(replace(job, test_set=make_test_set(MANY, pair=pair)))
        entries.append(CheckpointJobs(checkpoint, jobs, f"arm {checkpoint.name}"))
    return entries


def finished_files(folder: Path) -> dict[str, bytes]:
    assert not list(folder.glob("*.part"))
    return {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}


def make_list(folder: Path, sizes: list[list[int]], batch_size: int = 2) -> tuple[JobList, dict[int, Task]]:
    """A list of checkpoints, each with jobs of so many sentences; nothing is done of any."""
    tasks: dict[int, Task] = {}
    entries = []
    for number, counts in enumerate(sizes):
        own = []
        for count in counts:
            job = make_job(folder / f"{len(tasks)}.jsonl", [f"sentence {place}" for place in range(count)])
            store = DecodeStore(job.output_file, {}, job.test_set.ids)
            store.__enter__()
            tasks[len(tasks)] = Task(len(tasks), job, job.prompts(), store, (batch_size, 1000))
            own.append(tasks[len(tasks) - 1])
        engine = Engine("echo", Path(f"checkpoint-{number}"), "cpu", "float32", False)
        entries.append((Load(engine, {task.number: task.work for task in own}), own))
    return JobList(entries), tasks


def say_opened(jobs: JobList, number: int) -> None:
    works = jobs.load(number).works
    jobs.opened(number, {key: Sizes([5] * len(work.ids), [5] * len(work.ids)) for key, work in works.items()})


def say_done(jobs: JobList, task: Task, batch: Batch, put_off: tuple[int, ...] = ()) -> None:
    answer = {"hypothesis": "", "tokens": 1, "finished": True}
    answers = [None if place in put_off else dict(answer) for place in batch.positions]
    task.answer(Part(batch, batch.positions, answers))
    jobs.complete(batch)


def test_workers_begin_on_different_checkpoints_and_share_the_last(tmp_path: Path):
    jobs, tasks = make_list(tmp_path, [[4, 2], [4], [8]])
    assert (jobs.next(0), jobs.next(1)) == (0, 1)
    assert jobs.next(0) is None, "it is still being loaded"
    say_opened(jobs, 0)
    say_opened(jobs, 1)
    # Worker 0 stays with its checkpoint over both its jobs while worker 1 goes on to the next one.
    mine = [jobs.next(0) for _ in range(3)]
    assert [(batch.job, len(batch.positions)) for batch in mine] == [(0, 2), (0, 2), (1, 2)]
    theirs = [jobs.next(1) for _ in range(2)]
    assert [batch.job for batch in theirs] == [2, 2]
    for batch in theirs:
        say_done(jobs, tasks[2], batch)
    assert jobs.next(1) == 2
    say_opened(jobs, 2)
    assert jobs.next(1).job == 3
    # Nobody is left without work while the last checkpoint has some.
    for batch in mine:
        say_done(jobs, tasks[batch.job], batch)
    assert jobs.next(0) == 2
    say_opened(jobs, 2)
    assert [jobs.next(worker).job for worker in (0, 1, 0)] == [3, 3, 3]
    assert jobs.next(0) is None
    assert not jobs.waiting


def test_one_checkpoint_is_opened_by_all(tmp_path: Path):
    jobs, _ = make_list(tmp_path, [[6]])
    assert [jobs.next(worker) for worker in range(3)] == [0, 0, 0]
    say_opened(jobs, 0)
    assert sorted(jobs.next(worker).positions for worker in range(3)) == [(0, 1), (2, 3), (4, 5)]


def test_what_a_lost_worker_was_at_is_given_out_again(tmp_path: Path):
    jobs, tasks = make_list(tmp_path, [[4], [2]])
    assert jobs.next(0) == 0
    jobs.lost(0, None)  # while it loaded
    assert jobs.next(1) == 0
    say_opened(jobs, 0)
    batch = jobs.next(1)
    jobs.lost(1, batch)
    assert jobs.waits(batch)
    assert jobs.next(2) == 1
    assert jobs.next(3) == 0
    assert jobs.next(3) == batch
    # All of it had been told before the worker died.
    answer = {"hypothesis": "", "tokens": 1, "finished": True}
    tasks[0].answer(Part(batch, batch.positions, [answer, answer]))
    jobs.lost(3, batch)
    assert not jobs.waits(batch)


def test_sentences_that_were_put_off_make_the_next_round(tmp_path: Path):
    jobs, tasks = make_list(tmp_path, [[6]])
    jobs.next(0)
    say_opened(jobs, 0)
    first, second, third = (jobs.next(0) for _ in range(3))
    assert not first.patient
    say_done(jobs, tasks[0], first, put_off=(0,))
    say_done(jobs, tasks[0], second)
    assert jobs.next(0) is None
    say_done(jobs, tasks[0], third, put_off=(5,))
    assert jobs.next(0) == Batch(0, (0, 5), 1, patient=True)
    assert not tasks[0].done
    # A run that goes on from here neither decodes them again in the first round nor forgets them.
    tasks[0].store.close()
    again, tasks = make_list(tmp_path, [[6]])
    again.next(0)
    say_opened(again, 0)
    last = again.next(0)
    assert last == Batch(0, (0, 5), 1, patient=True)
    say_done(again, tasks[0], last)
    assert tasks[0].done
    assert again.next(0) is None


# Sweeps


def test_one_load_a_checkpoint_and_none_for_what_is_done(echo: EchoBackend, tmp_path: Path):
    models = [fake_checkpoint(tmp_path / f"checkpoint-{n}", b"w%d" % n) for n in range(3)]
    entries = entries_in(tmp_path / "out", models)
    finished: list[int] = []
    decode_sweep(entries[1:2], device="cpu")
    assert echo.loads == 1
    results = decode_sweep(entries, device="cpu", finished=lambda number, results: finished.append(number))
    assert echo.loads == 3
    assert finished == [1, 0, 2]
    assert [[result.resumed for result in own] for own in results] == [[0] * 4, [len(MANY)] * 4, [0] * 4]
    assert [result.output_file for own in results for result in own] == [
        job.output_file for entry in entries for job in entry.jobs
    ]
    decode_sweep(entries, device="cpu")
    assert echo.loads == 3


def test_refusals_of_any_checkpoint_come_before_anything_is_decoded(echo: EchoBackend, tmp_path: Path):
    models = [fake_checkpoint(tmp_path / f"checkpoint-{n}", b"w%d" % n) for n in range(2)]
    entries = entries_in(tmp_path / "out", models)
    entries[1].jobs[3].output_file.parent.mkdir(parents=True)
    entries[1].jobs[3].output_file.write_text("mine\n")
    with pytest.raises(UserError, match=r"1.de-en.3.jsonl: exists, without"):
        decode_sweep(entries, device="cpu")
    assert echo.loads == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["1.de-en.3.jsonl"]
    entries[1].jobs[3].output_file.unlink()
    both = [entries[0], CheckpointJobs(models[1], entries[0].jobs)]
    with pytest.raises(UserError, match="would both be written"):
        decode_sweep(both, device="cpu")


def test_progress_is_over_the_whole_sweep(
    echo: EchoBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    models = [fake_checkpoint(tmp_path / f"checkpoint-{n}", b"w%d" % n) for n in range(2)]
    entries = entries_in(tmp_path / "out", models)
    decode_sweep([CheckpointJobs(models[0], entries[0].jobs[:1])], device="cpu")
    original = EchoBackend.generate
    with monkeypatch.context() as patch:

        def stop(self: EchoBackend, prompts: Any, search: Any) -> Any:
            if len(self.sizes) > 3:
                raise KeyboardInterrupt
            return original(self, prompts, search)

        echo.sizes.clear()
        patch.setattr(EchoBackend, "generate", stop)
        with pytest.raises(KeyboardInterrupt):
            decode_sweep(entries, device="cpu", batch_size=3)
    reports: list[Any] = []
    monkeypatch.setattr("convexlm.decoding.progress.SECONDS_BETWEEN_LINES", 0.0)
    with progress_lines("[3/5] decode") as lines:

        def progress(state: Any) -> None:
            reports.append(state)
            lines(state)

        decode_sweep(entries, device="cpu", batch_size=3, progress=progress)
    total, before = 8 * len(MANY), len(MANY) + 12
    assert {(report.sweep.resumed, report.sweep.num_sentences) for report in reports} == {(before, total)}
    done = [report.sweep.done for report in reports]
    assert done[0] == before
    assert done == sorted(done)
    assert done[-1] == total
    assert [report.checkpoint for report in reports][-1] == "arm checkpoint-1"
    assert {report.num_jobs for report in reports} == {7}
    shown = capsys.readouterr().err
    assert f"[3/5] decode arm checkpoint-1 tiny de-en beam3 (7/7): {len(MANY)}/{len(MANY)} sentences" in shown
    assert f"of all {total}/{total}  {before} done before, " in shown
    assert " left" in shown


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("sweep")
    first = make_checkpoint(folder / "checkpoint-60", steps=60)
    second = folder / "checkpoint-61"
    shutil.copytree(first, second)
    model = AutoModelForCausalLM.from_pretrained(first)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    model.save_pretrained(second)
    return [first, second]


def test_a_sweep_by_any_number_of_processes_gives_the_same_bytes(
    two_checkpoints: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import torch

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number in (1, 3):
            folder = tmp_path / str(number)
            decode_sweep(entries_in(folder, two_checkpoints), device="cpu", batch_size=4, num_processes=number)
    finally:
        torch.set_num_threads(before)
    whole = finished_files(tmp_path / "1")
    assert len(whole) == 8
    assert whole["0.en-de.1.jsonl"] != whole["1.en-de.1.jsonl"]
    assert finished_files(tmp_path / "3") == whole


# Long answers


def test_a_batch_waits_as_long_again_as_it_took():
    patience = Patience(rows=16, max_new_tokens=400)
    assert not any(patience.over(16, step) for step in range(1, 30))
    assert not any(patience.over(2, step) for step in range(30, 60))
    assert patience.over(2, 60)
    assert not Patience(16, 400).over(3, 200), "three of sixteen are not few"
    assert not Patience(1, 400).over(1, 390), "nothing else waits for it"
    near = Patience(16, 100)
    assert not any(near.over(1, step) for step in range(30, 100)), "it is cut soon"
    assert not any(Patience(16, 400).over(1, step) for step in range(1, LEAST_STEPS))


class Wayward(Backend):
    """Greedy answers of one token, but of two hundred for a few prompts; counts the steps that its batches take."""

    steps: list[int] = []

    def load(self, checkpoint: Path, device: str, dtype: str, *, trust_remote_code: bool = False) -> None:
        self.steps = []

    def encode(self, prompts: Any, settings: PromptSettings) -> list[list[int]]:
        return [list(prompt.encode()) for prompt in prompts]

    def generate_most(self, prompts: Any, search: Search) -> list[Hypothesis | None]:
        return self._run(prompts, search, Patience(len(prompts), search.max_new_tokens))

    def generate(self, prompts: Any, search: Search) -> list[Hypothesis]:
        return [hypothesis for hypothesis in self._run(prompts, search, None) if hypothesis]

    def _run(self, prompts: Any, search: Search, patience: Patience | None) -> list[Hypothesis | None]:
        lengths = [search.max_new_tokens if b"long" in bytes(prompt) else 20 for prompt in prompts]
        for step in range(1, max(lengths) + 1):
            still = sum(length > step for length in lengths)
            if patience is not None and still and patience.over(still, step):
                self.steps.append(step)
                return [None if length > step else self._answer(length) for length in lengths]
        self.steps.append(max(lengths))
        return [self._answer(length) for length in lengths]

    def _answer(self, length: int) -> Hypothesis:
        return Hypothesis([7] * length, -1.0, length < 200)

    def text(self, hypothesis: Hypothesis) -> str:
        return f"{len(hypothesis.token_ids)} tokens"


def test_no_batch_waits_for_a_sentence_that_runs_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    engine = Wayward()
    monkeypatch.setattr(run_module, "get_backend", lambda name: lambda: engine)
    # The same length everywhere, so that sorting does not bring the long ones together.
    sources = ["long" if place % 16 == 3 else "four" for place in range(160)]
    job = make_job(tmp_path / "out.jsonl", sources, max_new_tokens=200)
    ((result,),) = decode_sweep([CheckpointJobs(fake_checkpoint(tmp_path / "m"), [job])], batch_size=16)
    assert engine.steps == [40] * 10 + [200]
    assert result.cut == 10
    assert [row["hypothesis"] for row in read(job.output_file)] == [
        "200 tokens" if source == "long" else "20 tokens" for source in sources
    ]


@pytest.mark.parametrize(("num_beams", "first_seed"), [(1, 20), (3, 7)])
def test_putting_off_changes_no_hypothesis(num_beams: int, first_seed: int):
    """Against each sentence decoded alone, with a model most of whose answers are short."""
    import torch

    from convexlm.decoding.generation import Prefix, beam_search, greedy_search
    from test_decoding_loops import EOS, PAD, random_prompts, tiny

    for seed in range(first_seed, first_seed + 40):
        model, prompts = tiny("llama", seed), random_prompts(seed, count=16)
        search = Search(num_beams=num_beams, max_new_tokens=120, early_stopping=num_beams > 1)
        loop = greedy_search if num_beams == 1 else beam_search
        with torch.inference_mode():
            common = (search, EOS, PAD, Prefix(model, prompts))
            some = loop(model, prompts, *common, Patience(len(prompts), 120))
            if any(found is None for found in some):
                break
    else:
        pytest.fail("no model has a few long answers among short ones")
    places = [place for place, found in enumerate(some) if found is None]
    with torch.inference_mode():
        alone = [loop(model, [prompt], *common)[0] for prompt in prompts]
        later = loop(model, [prompts[place] for place in places], *common)
    together = [found if found is not None else later.pop(0) for found in some]

    def ids(found: Any) -> Any:
        return found.token_ids if num_beams == 1 else [hypothesis.token_ids for hypothesis in found]

    assert 0 < len(places) <= 2
    assert [ids(found) for found in together] == [ids(found) for found in alone]


# Hostile text


def test_hostile_text_goes_through_workers_and_nbest(tmp_path: Path):
    """What a model says, and what it is asked, through 1, 2 and 3 processes: the same bytes, and the very text."""
    from decoding_hostile import ANSWERS, QUESTIONS

    model = fake_checkpoint(tmp_path / "model")
    for number in (1, 2, 3):
        for beams in (1, 3):
            job = make_job(tmp_path / f"{number}" / f"{beams}.jsonl", QUESTIONS, num_beams=beams)
            if beams > 1:
                job = replace(job, search=Search(num_beams=beams, num_return_sequences=3))
            options: dict[str, Any] = {"backend": "hostile", "device": "cpu", "batch_size": 3}
            decode_sweep([CheckpointJobs(model, [job])], num_processes=number, **options)
            raw = job.output_file.read_bytes()
            assert raw == (tmp_path / "1" / f"{beams}.jsonl").read_bytes()
            assert len(raw.decode("utf-8").splitlines()) == len(QUESTIONS)
            rows = read(job.output_file)
            assert [row["source"] for row in rows] == QUESTIONS
            answers = [ANSWERS[place % len(ANSWERS)] for place in range(len(QUESTIONS))]
            assert [row["hypothesis"] for row in rows] == answers
            assert read_hypotheses(job.output_file) == answers, "blank ones stay in step"
            for place, row in enumerate(rows if beams > 1 else []):
                following = [ANSWERS[(place + more) % len(ANSWERS)] for more in range(3)]
                assert [entry["hypothesis"] for entry in row["nbest"]] == following
            assert json.loads((tmp_path / str(number) / f"{beams}.meta.json").read_text())["backend"] == "hostile"
