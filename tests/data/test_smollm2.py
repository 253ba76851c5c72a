"""SmolLM2: preparing it once, complete or not at all; its tokenizer and chat template, skipped where it is missing."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data import Problem, PromptBuilder, smollm2, stop_token_ids, vocabulary_size
from data.prompts import FEW_SHOT, token_text
from trainer.attention import model_inputs

USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"


# ---- preparing it ----


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "_from_hub", lambda out: None)


def write(out: Path) -> str:
    out.mkdir()
    (out / "config.json").write_text("{}")
    return "package"


def test_a_prepared_folder_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: None):
    calls = []
    monkeypatch.setattr(smollm2, "_from_package", lambda out: calls.append(out) or write(out))
    assert [smollm2.prepare(tmp_path / "model") for _ in range(2)] == ["package"] * 2
    assert len(calls) == 1 and (tmp_path / "model" / "config.json").exists()


def test_an_interrupted_preparation_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: None):
    def interrupted(out: Path) -> str:
        write(out)
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_from_package", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2.prepare(tmp_path / "model")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(smollm2, "_from_package", write)
    assert smollm2.prepare(tmp_path / "model") == "package"


def test_a_missing_model_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], no_hub: None
):
    monkeypatch.setattr(smollm2, "find_gguf", lambda: None)
    assert smollm2.main([str(tmp_path / "model")]) == 2
    error = capsys.readouterr().err
    assert "run make demo-llm" in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


# ---- tokenizer and chat template ----


@pytest.fixture(scope="module")
def tokenizer(real_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(real_model)


def problem(text: str) -> Problem:
    return Problem("set/0", text, "1", "set", None)


def builder(tokenizer: Any, template: str, system: str = "default", chat: bool = True) -> PromptBuilder:
    return PromptBuilder(tokenizer, template=template, system_prompt=system, chat_template=chat)


def test_solved_examples_are_turns_of_the_chat(tokenizer: Any) -> None:
    """The BOS token opens every turn, so a prompt without a system turn must not get a second one in front."""
    examples = "".join(f"{USER}{q}{END}{ASSISTANT}{a}{END}" for q, a in FEW_SHOT)
    made = builder(tokenizer, "few_shot")
    assert tokenizer.bos_token == "<|im_start|>"
    assert made.text(problem("1 + 1?")) == f"{examples}{USER}1 + 1?{END}{ASSISTANT}"
    ids = made.build(problem("1 + 1?"))
    assert ids.count(tokenizer.bos_token_id) == 2 * len(FEW_SHOT) + 2
    assert tokenizer.decode(ids) == made.text(problem("1 + 1?"))


def test_solved_examples_without_a_chat_template(tokenizer: Any) -> None:
    text = builder(tokenizer, "few_shot", chat=False).text(problem("1 + 1?"))
    assert text == "".join(f"{q}\n{a}\n\n" for q, a in FEW_SHOT) + "1 + 1?\n"


def test_the_default_system_turn_is_the_models_own(tokenizer: Any) -> None:
    own = builder(tokenizer, "plain").text(problem("?"))
    assert own.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert builder(tokenizer, "plain", system="none").text(problem("?")) == f"{USER}?{END}{ASSISTANT}"


def test_responses_stop_at_the_end_of_the_assistant_turn(real_model: Path, tokenizer: Any) -> None:
    assert stop_token_ids(str(real_model), tokenizer) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert vocabulary_size(tokenizer) == 49152


def test_a_control_token_in_a_problem_stays_text(tokenizer: Any) -> None:
    made, asked = builder(tokenizer, "plain", system="none"), problem("What does <|im_end|> mean?")
    ids = made.build(asked)
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids) == made.text(asked)


def test_each_token_of_a_response_has_a_readable_text(tokenizer: Any) -> None:
    """A token that is a part of a character shows its bytes; whole ones join to the response's text."""
    text = " The sum\n is 12.\n\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(token_text(tokenizer, token) for token in ids) == text
    crab = tokenizer("🦀", add_special_tokens=False)["input_ids"]
    shown = " ".join(token_text(tokenizer, token).strip("<>") for token in crab)
    assert len(crab) > 1 and bytes.fromhex(shown).decode() == "🦀"
    assert token_text(tokenizer, tokenizer.eos_token_id) == "<|im_end|>"


def test_packed_real_prompts_predict_the_same_tokens_as_padded_ones(real_model: Path, tokenizer: Any) -> None:
    """Log-probs of a group that shares its prompt and of a second prompt, in both layouts."""
    from transformers import AutoModelForCausalLM

    from trainer.attention import register_attention

    register_attention()
    made = builder(tokenizer, "few_shot")
    prompts = [made.build(problem(q)) for q in ("What is 4 + 3?", "What is 4 + 3?", "Calculate 9 - 5.")]
    responses = [tokenizer(r, add_special_tokens=False)["input_ids"] + [2] for r in ("4 + 3 = 7", " é 🦀", "\n\n4")]
    found = []
    for layout, attention in (("padded", "sdpa"), ("by_sequence", "sdpa_by_sequence")):
        model = AutoModelForCausalLM.from_pretrained(real_model, attn_implementation=attention).eval()
        x = SimpleNamespace(**model_inputs(prompts, responses, layout=layout, device=torch.device("cpu")))
        extra = {} if layout == "padded" else {"sequences": x.sequences, "places": x.places}
        with torch.no_grad():
            hidden = model.model(
                x.input_ids, attention_mask=x.attention_mask, position_ids=x.position_ids, use_cache=False, **extra
            ).last_hidden_state
            logits = model.lm_head(hidden.flatten(0, 1)[x.predictors])
        assert x.targets.tolist() == [token for response in responses for token in response]
        found.append(logits.log_softmax(-1).gather(-1, x.targets[:, None]))
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)
