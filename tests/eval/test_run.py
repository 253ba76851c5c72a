"""python -m eval.run with a real model, engine and verifier: resuming, growing, refusing, several processes."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from data.toy import toy_problems
from eval.evaluate import Job
from eval.run import (
    EvalConfig,
    check_settings,
    configure,
    gpu_of,
    main,
    prepare,
    read_answers,
    run,
    warn_of_golds,
)
from rewards import Verifier
from trainer.checkpoint import begin, commit
from trainer.rollout import MOST_SEQUENCES

pytestmark = pytest.mark.slow

SAMPLES = 4


@pytest.fixture(scope="module", autouse=True)
def one_sequence_at_a_time() -> Iterator[None]:
    """The hf engine seeds a whole batch; with one sequence per batch it seeds each sample."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MOST_SEQUENCES, "hf", 1)
        yield


@pytest.fixture(scope="module")
def config(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> EvalConfig:
    """Two sets of the synthetic task as files, two processes."""
    folder = tmp_path_factory.mktemp("work")
    for name, part in (("easy", slice(0, 5)), ("hard", slice(5, 8))):
        rows = [{"problem": p.problem, "answer": p.gold} for p in toy_problems("toy_eval")[part]]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return EvalConfig(
        model=str(tiny_model),
        sets=f"{folder}/easy.jsonl,{folder}/hard.jsonl",
        samples=SAMPLES,
        output_dir=str(folder / "evals"),
        name="two",
        prompt_template="plain",
        chat_template=False,
        max_prompt_tokens=16,
        max_response_tokens=12,
        engine="hf",
        processes=2,
        verifier_workers=1,
    )


@pytest.fixture(scope="module")
def metrics(config: EvalConfig) -> dict[str, float]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "-1")  # names no second device
        return run(config)


def answers(config: EvalConfig) -> int:
    return (config.folder / "answers.jsonl").read_text().count("\n")


def samples(config: EvalConfig) -> list[dict]:
    return [json.loads(line) for line in (config.folder / "samples.jsonl").read_text().splitlines()]


def test_two_processes_share_the_work_and_the_results_add_up(config: EvalConfig, metrics: dict[str, float]) -> None:
    assert answers(config) == 32 and len(list(config.folder.glob("log_*.txt"))) == 2
    rows = samples(config)
    keys = [(row["set"], row["problem"], row["sample"]) for row in rows]
    assert keys == [(s, f"{s}/{i}", j) for s, n in (("easy", 5), ("hard", 3)) for i in range(n) for j in range(SAMPLES)]
    right = [row["correct"] for row in rows if row["set"] == "easy"]
    assert 0 < sum(right) < len(right) and metrics[f"eval/easy/mean@{SAMPLES}"] == pytest.approx(sum(right) / 20)
    results = json.loads((config.folder / "results.json").read_text())
    assert results["metrics"] == metrics and results["problems"] == {"easy": 5, "hard": 3}
    assert {f"eval/hard/pass@{k}" for k in (1, 2, 4)} < metrics.keys()
    assert sum(results["reasons"]["easy"].values()) == 20
    assert results["config"]["temperature"] == 1.0


def test_a_second_call_samples_only_what_is_missing(
    config: EvalConfig, metrics: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    before = samples(config)
    # Interrupted in the middle of a line: 21 complete answers are left.
    file = config.folder / "answers.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:21]) + lines[21][:40])
    capsys.readouterr()
    fewer = dataclasses.replace(config, processes=1)
    assert run(fewer) == metrics and samples(config) == before
    said = capsys.readouterr().out
    assert "warning: answers.jsonl: no JSON object with set, problem, sample in line 22; left out" in said
    assert "21 answers are there, 11 to sample" in said and answers(config) == 32
    # Nothing is missing now: no process is started, the table is the same.
    (config.folder / "log_0.txt").unlink()
    assert run(config) == metrics
    assert answers(config) == 32 and not (config.folder / "log_0.txt").exists()
    assert "32 answers are there, 0 to sample" in capsys.readouterr().out


def test_more_samples_keep_those_that_are_there(config: EvalConfig, metrics: dict[str, float]) -> None:
    """One process alone, one set, then more samples of both sets: the same answers as two processes gave at once."""
    one = dataclasses.replace(config, name="one", processes=1, samples=2, sets=str(config.sets).split(",")[1])
    run(one)
    grown = dataclasses.replace(one, samples=SAMPLES, sets=config.sets)
    assert run(grown) == metrics and samples(grown) == samples(config)
    fewer = run(one)  # asking for less than there is
    first = [row["correct"] for row in samples(config) if row["set"] == "hard" and row["sample"] < 2]
    assert fewer["eval/hard/mean@2"] == pytest.approx(sum(first) / 6)


def test_a_corrected_gold_needs_no_sampling(config: EvalConfig, metrics: dict[str, float], tmp_path: Path) -> None:
    """Grading is done anew at each call: with every gold wrong, nothing is right, and nothing is sampled."""
    files = []
    for file in map(Path, str(config.sets).split(",")):
        rows = [json.loads(line) | {"answer": "12345"} for line in file.read_text().splitlines()]
        files.append(tmp_path / file.name)
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = answers(config)
    corrected = run(dataclasses.replace(config, sets=", ".join(map(str, files))))
    assert corrected["eval/easy/mean@4"] == corrected["eval/hard/pass@4"] == 0 < metrics["eval/easy/mean@4"]
    assert answers(config) == before


def test_other_settings_are_refused(config: EvalConfig, metrics: dict[str, float], tmp_path: Path) -> None:
    for change, says in (
        ({"temperature": 0.5}, "temperature: 1.0 there, 0.5 now"),
        ({"max_response_tokens": 13}, "max_tokens: 12 there, 13 now"),
        ({"seed": 1}, "seed: 0 there, 1 now"),
    ):
        with pytest.raises(ValueError, match=says):
            run(dataclasses.replace(config, **change))
    other = tmp_path / "easy.jsonl"
    other.write_text('{"problem": "1+1+1+1=", "answer": "4"}\n')
    with pytest.raises(ValueError, match="prompts of easy: "):
        run(dataclasses.replace(config, sets=str(other)))


@pytest.mark.parametrize("line", [b'{"set"', b'{"set": "easy", "problem": 0}', b"\xff", b"1" * 5000, b"[]"])
@pytest.mark.promise("malformed lines in labelled data, stored responses, metrics and samples")
def test_stored_files_that_cannot_be_read_are_named(
    tmp_path: Path, line: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    good = b'{"set": "easy", "problem": "0", "sample": 0}\n'
    (tmp_path / "answers.jsonl").write_bytes(good + line + b"\n")
    every = [Job("easy", "0", "7", [1], [0, 1])]
    assert list(read_answers(tmp_path / "answers.jsonl", every)) == [("easy", "0", 0)]
    assert "answers.jsonl: no JSON object with set, problem, sample in line 2; left out" in capsys.readouterr().out
    assert (tmp_path / "answers.jsonl").read_bytes() == good
    if line != b'{"set": "easy", "problem": 0}':
        (tmp_path / "settings.json").write_bytes(line)
        (tmp_path / "answers.jsonl").write_bytes(good)
        with pytest.raises(ValueError, match="settings.json"):
            check_settings(tmp_path / "settings.json", {"seed": 0})


def test_settings_are_compared_once_an_answer_is_stored(tmp_path: Path) -> None:
    check_settings(tmp_path / "settings.json", {"seed": 0})
    (tmp_path / "answers.jsonl").write_text("")
    check_settings(tmp_path / "settings.json", {"seed": 1})
    (tmp_path / "answers.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="seed: 1 there, 2 now"):
        check_settings(tmp_path / "settings.json", {"seed": 2})


@pytest.mark.promise("a 10 MB gold")
def test_a_long_gold_is_told_in_a_short_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Verifier(workers=1, timeout_s=2.0, memory_gib=2.0, grader="math") as verifier:
        warn_of_golds(verifier, [Job("easy", "easy/0", "x" * 10_000_000, [1], [0])])
    said = capsys.readouterr().out
    assert "easy/0: gold 'xxx" in said and "counts as unsolved" in said and len(said) < 300


def test_other_weights_in_the_same_place_are_refused(
    config: EvalConfig, metrics: dict[str, float], tiny_model: Path
) -> None:
    weights = tiny_model / "model.safetensors"
    kept = weights.read_bytes()
    try:
        weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        with pytest.raises(ValueError, match="other settings .model: "):
            run(config)
    finally:
        weights.write_bytes(kept)


def test_other_arguments_of_vllm_are_refused(config: EvalConfig, metrics: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"other settings \(vllm: \{\} there, \{'quantization': 'fp8'\} now\)"):
        run(dataclasses.replace(config, vllm={"quantization": "fp8"}))


def test_a_process_that_fails_is_reported_with_its_last_words(
    config: EvalConfig, tiny_model: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(RuntimeError, match=r"stopped with code 1:(.|\n)*SafetensorError(.|\n)*resumes"):
        run(dataclasses.replace(config, model=str(broken), name="broken", processes=1))


def test_each_process_sees_one_gpu() -> None:
    assert gpu_of(3, None) == "3" and gpu_of(1, "4,6") == "6"


@pytest.fixture
def trained(tiny_model: Path, tmp_path: Path) -> Path:
    """A run folder with the checkpoints of steps 5 and 10, whose settings are those of the synthetic task."""
    settings = {"run_name": "band", "prompt_template": "plain", "chat_template": False, "engine": "hf", "top_k": 0}
    settings |= {"max_prompt_tokens": 16, "max_response_tokens": 12, "eval_data": ["toy_eval"], "eval_samples": 8}
    settings |= {"trust_remote_code": True, "seed": 7, "save_every": 5}
    folder = tmp_path / "runs" / "band"
    for step in (5, 10):
        new = begin(folder / "checkpoints", step)
        shutil.copytree(tiny_model, new / "policy")
        (new / "config.yaml").write_text(yaml.safe_dump(settings))
        commit(folder / "checkpoints", step, {})
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "metrics.jsonl").write_text('{"step": 10}\n')
    return folder


def test_a_policy_of_a_run_is_evaluated_as_it_was_trained(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest, earlier = trained / "checkpoints" / "step_000010", trained / "checkpoints" / "step_000005"
    config = configure([str(trained)])
    assert config.model == str(newest / "policy") and config.folder == Path("evals/band_step_000010_toy_eval")
    assert (config.prompt_template, config.chat_template, config.engine) == ("plain", False, "hf")
    assert (config.max_prompt_tokens, config.max_response_tokens) == (16, 12)
    assert (config.set_names, config.samples) == (["toy_eval"], 8)
    assert not config.trust_remote_code and config.seed == 0  # these are never taken over
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{newest}/policy: band, step 10; settings of the run: sets=['toy_eval'] samples=8 prompt_t")
    prompts, work = prepare(config)
    assert len(prompts["toy_eval"]) == 128 and work.sampling.max_tokens == 12
    capsys.readouterr()
    other = configure(["--model", str(earlier / "policy"), "--samples", "2", "--max_response_tokens=4096"])
    assert (other.model, other.samples, other.max_response_tokens) == (str(earlier / "policy"), 2, 4096)
    assert "samples" not in capsys.readouterr().out
    assert configure(["--model", str(earlier), "--name", "mine"]).folder == Path("evals/mine")


def test_a_file_of_the_evaluation_comes_before_the_run(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"model: {trained}\nsamples: 3\n")
    config = configure(["--config", str(file), "--temperature", "0.6"])
    assert (config.samples, config.temperature, config.prompt_template) == (3, 0.6, "plain")


def test_a_checkpoint_that_is_not_whole_is_passed_over_or_refused(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = trained / "checkpoints" / "step_000010" / "policy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "step_000005" in configure([str(trained)]).model
    assert "warning: checkpoint step_000010 is damaged and skipped" in capsys.readouterr().out
    assert main([str(weights.parent)]) == 2
    assert "model.safetensors has" in capsys.readouterr().err


def test_a_model_of_no_run_keeps_the_defaults(tiny_model: Path) -> None:
    assert configure(["--model", str(tiny_model)]) == EvalConfig(model=str(tiny_model))
    assert EvalConfig(model="Qwen/Qwen2.5-3B", sets="aime24, /data/mine.jsonl").folder == Path(
        "evals/Qwen_Qwen2.5-3B_aime24_mine"
    )


def test_mistakes_are_one_line(trained: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that load_or_exit finds, those found when data or model are opened, and those that an engine finds."""
    young = trained.parent / "young"
    (young / "checkpoints").mkdir(parents=True)
    (young / "metrics.jsonl").write_text("")
    (young / "config.yaml").write_text("save_every: 5\n")
    run_of = ["--output_dir", str(trained.parent.parent / "evals"), "--model", str(trained)]
    for argv, told in (
        ([*run_of, "--sets", "aime42"], "error: sets: unknown set 'aime42'"),
        ([*run_of, "--sets", "toy_evla"], "error: sets: 'toy_evla' is not a generated set"),
        ([*run_of, "--sets", "a/test.jsonl,b/test.jsonl"], "sets: a/test.jsonl and b/test.jsonl would both be test"),
        ([*run_of, "--sets", ","], "sets: names no set"),
        ([*run_of, "--sample", "3"], "did you mean samples?"),
        (
            [*run_of, "--seed", str(2**32)],
            "seed: must be an integer from 0 and at most 4294967295",
        ),
        ([*run_of, "--prompt_template", "plian"], "prompt_template: 'plian' is not known"),
        ([*run_of, "--max_prompt_tokens", "1"], "max_prompt_tokens 1: all 128 prompts are longer"),
        ([str(trained.with_name("bnad"))], f"is not a run; did you mean {trained}?"),
        ([str(trained.parent)], f"is not a run; did you mean {trained}, {young}?"),
        ([str(young)], "has no complete checkpoint yet (save_every"),
        ([str(trained), str(young)], f"{str(young)!r:.40}"),
        (["--vllm.logprobs_mode", "raw_logprobs"], "vllm: logprobs_mode is set by the trainer; remove it"),
        (["--model", "nothing"], "model: nothing is not a folder that exists, nor a hub id"),
    ):
        try:
            code = main(argv)
        except SystemExit as stopped:
            code = stopped.code
        (line,) = capsys.readouterr().err.splitlines()
        assert code == 2 and told in line, line


def test_what_an_engine_does_not_take_is_one_line(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found by the sampling process, after this one has loaded everything: a model without weights."""
    shutil.copytree(tiny_model, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    words = ["--prompt_template", "plain", "--chat_template", "false", "--engine", "hf", "--max_prompt_tokens", "16"]
    words += ["--sets", "toy_eval", "--samples", "1", "--output_dir", str(tmp_path), "--verifier_workers", "1"]
    assert main([str(tmp_path / "empty"), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "model.safetensors" in line


def test_an_answer_of_vllm_does_not_depend_on_the_batch(config: EvalConfig) -> None:
    """Seven of 32 answers are sampled again by another process: the same texts."""
    one = dataclasses.replace(config, engine="vllm", vllm={"max_num_seqs": 16}, name="vllm", processes=1)
    metrics, before = run(one), samples(one)
    file = one.folder / "answers.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:25]))
    assert run(one) == metrics and samples(one) == before
