"""Prompts and stop ids, on small tokenizers whose chat templates (our wording) behave as the models' do."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import data
from data.formats import DAPO_PREFIX, DAPO_SUFFIX
from data.toy import make_tokenizer as toy_tokenizer

# Like Qwen2.5: no BOS, a default system text when none is given.
CHATML = (
    "{% if messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n"
    "{% else %}<|im_start|>system\nDefault persona.<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like Llama-3: the template writes BOS, content is trimmed, no default system text. DATED adds 3.1's dated header.
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
DATED = (
    "{{ bos_token }}{% set has = messages[0].role == 'system' %}"
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "<|start|>system<|end|>\n\nToday: {{ date_string }}\n{{ messages[0].content if has else '' }}<|eot_id|>"
    "{% set rest = messages[1:] if has else messages %}"
    "{% for m in rest %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
# Like the R1 distills: BOS, bare system text, an opened <think> as prefill, EOS after an answer.
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}<|User|>{{ m.content }}"
    "{% else %}<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
IGNORES_SYSTEM = LLAMA.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + LLAMA
NEEDS_USER = "{% if messages[-1].role == 'system' %}{{ raise_exception('no user query') }}{% endif %}" + CHATML

PROBLEM = data.Problem("t/0", "What is {x} + 1 for $x=2$?", "3", "t", None)


def make_tokenizer(chat_template: str | None, *, adds_bos: bool = False, eos: str = "</s>") -> PreTrainedTokenizerFast:
    """Byte-level, one token per byte; special tokens of all the families."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        "<s>",
        "</s>",
        "<|im_start|>",
        "<|im_end|>",
        "<|start|>",
        "<|end|>",
        "<|eot_id|>",
        "<|User|>",
        "<|Assistant|>",
    ]
    tokenizer.add_special_tokens(special)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos)
    fast.chat_template = chat_template
    return fast


def count_bos(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> int:
    return sum(token == tokenizer.bos_token_id for token in ids)


def build(tokenizer: PreTrainedTokenizerFast, template: str, system: str | None, chat: bool) -> tuple[str, list[int]]:
    """Text and ids; the ids must spell the text, but for a BOS in front."""
    builder = data.PromptBuilder(tokenizer, template=template, system_prompt=system, chat_template=chat)
    text, ids = builder.text(PROBLEM), builder.build(PROBLEM)
    assert str(tokenizer.decode(ids)).removeprefix("<s>") == text.removeprefix("<s>")
    return text, ids


USER = f"<|im_start|>user\n{PROBLEM.problem}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("dapo", f"{DAPO_PREFIX}{PROBLEM.problem}{DAPO_SUFFIX}"),
        ("boxed", f"Please reason step by step, and put your final answer within \\boxed{{}}.\n\n{PROBLEM.problem}"),
        ("boxed_verl", f"{PROBLEM.problem} Let's think step by step and output the final answer within \\boxed{{}}."),
        ("r1", f"{PROBLEM.problem}\nPlease reason step by step, and put your final answer within \\boxed{{}}."),
        ("plain", PROBLEM.problem),
    ],
)
def test_the_named_templates_without_a_chat_template(template: str, text: str) -> None:
    assert build(make_tokenizer(None), template, "default", False)[0] == text


def test_dapo_wording() -> None:
    # Spelled out once more, from the published prompts: a changed letter here is a changed experiment.
    text = build(make_tokenizer(None), "dapo", "default", False)[0]
    assert text == (
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
        "$Answer (without quotes) where $Answer is the answer to the problem.\n\nWhat is {x} + 1 for $x=2$?\n\n"
        'Remember to put your answer on its own line after "Answer:".'
    )


def test_r1_zero_is_a_whole_prompt() -> None:
    tokenizer = make_tokenizer(CHATML)
    text = build(tokenizer, "r1_zero", "default", False)[0]
    assert text.startswith("A conversation between User and Assistant. The User asks")
    assert text.endswith(f"</answer>.\nUser: {PROBLEM.problem}\nAssistant: <think>")
    with pytest.raises(ValueError, match="r1_zero.*set chat_template: false"):
        build(tokenizer, "r1_zero", "default", True)


def test_qwen_like_default_none_and_own_system_turn() -> None:
    tokenizer = make_tokenizer(CHATML)
    default = f"<|im_start|>system\nDefault persona.<|im_end|>\n{USER}"
    assert build(tokenizer, "plain", "default", True)[0] == default
    assert build(tokenizer, "plain", None, True)[0] == default
    assert build(tokenizer, "plain", "none", True)[0] == USER
    assert build(tokenizer, "plain", "Be brief.", True)[0] == f"<|im_start|>system\nBe brief.<|im_end|>\n{USER}"
    boxed = "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
    assert build(tokenizer, "boxed", "default", True)[0] == boxed + USER
    assert "system" not in build(tokenizer, "r1", "default", True)[0]  # R1 wants none, whatever the chat template does


@pytest.mark.parametrize("adds_bos", [True, False])
def test_llama_like_has_one_bos(adds_bos: bool) -> None:
    tokenizer = make_tokenizer(LLAMA, adds_bos=adds_bos, eos="<|eot_id|>")
    user = f"<|start|>user<|end|>\n\n{PROBLEM.problem}<|eot_id|><|start|>assistant<|end|>\n\n"
    for system in ("default", "none"):
        text, ids = build(tokenizer, "plain", system, True)
        assert text == "<s>" + user
        assert ids[0] == tokenizer.bos_token_id and count_bos(tokenizer, ids) == 1
    text, ids = build(tokenizer, "plain", "Be brief.", True)
    assert text == f"<s><|start|>system<|end|>\n\nBe brief.<|eot_id|>{user}"
    assert count_bos(tokenizer, ids) == 1


def test_r1_like_prefill_and_bos() -> None:
    tokenizer = make_tokenizer(R1, adds_bos=True)
    instruction = "Please reason step by step, and put your final answer within \\boxed{}."
    for system in ("default", "none"):
        text, ids = build(tokenizer, "r1", system, True)
        assert text == f"<s><|User|>{PROBLEM.problem}\n{instruction}<|Assistant|><think>\n"
        assert count_bos(tokenizer, ids) == 1


def test_a_dated_system_turn_is_the_same_every_day_and_can_be_removed() -> None:
    tokenizer = make_tokenizer(DATED)
    assert "Today: 26 Jul 2024\n" in build(tokenizer, "plain", "default", True)[0]
    user = f"<|start|>user<|end|>\n\n{PROBLEM.problem}<|eot_id|><|start|>assistant<|end|>\n\n"
    assert build(tokenizer, "plain", "none", True)[0] == "<s>" + user


def test_strftime_now_of_a_template_formats_a_fixed_date() -> None:
    tokenizer = make_tokenizer(CHATML + "{{ strftime_now('%Y-%m-%d %H:%M:%S') }}")
    assert build(tokenizer, "plain", "default", True)[0].endswith("2024-07-26 00:00:00")


def test_none_with_templates_that_refuse_or_entangle_system_turns() -> None:
    plain = build(make_tokenizer(LLAMA), "plain", "default", True)[0]
    for template in (REFUSES_SYSTEM, IGNORES_SYSTEM):
        assert build(make_tokenizer(template), "plain", "none", True)[0] == plain
    with pytest.raises(ValueError, match="system_prompt: none cannot be had.*default, or a text"):
        build(make_tokenizer(NEEDS_USER), "plain", "none", True)


def test_without_chat_template_bos_exactly_when_the_tokenizer_adds_it() -> None:
    for adds_bos in (True, False):
        tokenizer = make_tokenizer(None, adds_bos=adds_bos)
        text, ids = build(tokenizer, "plain", "default", False)
        assert text == PROBLEM.problem
        assert count_bos(tokenizer, ids) == (1 if adds_bos else 0)
        assert ids == tokenizer(text)["input_ids"]


def test_a_chat_template_without_bos_stays_without() -> None:
    tokenizer = make_tokenizer(CHATML, adds_bos=True)
    assert count_bos(tokenizer, build(tokenizer, "plain", "default", True)[1]) == 0


def test_bare_text_with_a_system_text_in_front() -> None:
    assert build(make_tokenizer(None), "plain", "Be brief.", False)[0] == f"Be brief.\n\n{PROBLEM.problem}"
    assert build(make_tokenizer(None), "plain", "none", False)[0] == PROBLEM.problem


def test_contradictory_choices_are_refused() -> None:
    with pytest.raises(
        ValueError, match="'drgrpo' is not known; use one of dapo, boxed, boxed_verl, r1, r1_zero, plain"
    ):
        build(make_tokenizer(CHATML), "drgrpo", "default", True)
    with pytest.raises(ValueError, match="chat_template: the tokenizer has none; set it to false"):
        build(make_tokenizer(None), "dapo", "default", True)
    with pytest.raises(ValueError, match="'boxed' has its instruction in the system turn.*r1 or boxed_verl"):
        build(make_tokenizer(CHATML), "boxed", "none", True)


def test_long_prompts_are_dropped_and_counted_never_cut() -> None:
    tokenizer = make_tokenizer(CHATML)
    builder = data.PromptBuilder(tokenizer, template="plain", system_prompt="none", chat_template=True)
    problems = [data.Problem(f"t/{n}", "x" * n, "1", "t", None) for n in (1, 50, 2, 51, 3)]
    limit = len(builder.build(problems[1]))
    kept, dropped = data.build_prompts(problems, builder, max_prompt_tokens=limit)
    assert [problem.id for problem, _ in kept] == ["t/1", "t/50", "t/2", "t/3"] and dropped == 1
    assert all(ids == builder.build(problem) for problem, ids in kept)
    with pytest.raises(
        ValueError, match=r"max_prompt_tokens 5: all 5 prompts are longer, the shortest .* at least \d+"
    ):
        data.build_prompts(problems, builder, max_prompt_tokens=5)
    with pytest.raises(ValueError, match="all 0 prompts"):
        data.build_prompts([], builder, max_prompt_tokens=5)


def test_a_huge_problem_is_dropped_without_being_tokenized() -> None:
    tokenizer = make_tokenizer(CHATML)
    builder = data.PromptBuilder(tokenizer, template="plain", system_prompt="none", chat_template=True)
    assert builder.longest_token == len("<|Assistant|>")
    huge = data.Problem("t/0", "x" * (100 * builder.longest_token + 1), "1", "t", None)
    turn = {"role": "user", "content": huge.problem}
    tokenized: list[str] = []
    encode = builder._encode
    builder._encode = lambda texts: tokenized.extend(texts) or encode(texts)
    kept, dropped = data.build_prompts([PROBLEM, huge, replace(huge, messages=(turn,))], builder, max_prompt_tokens=100)
    assert ([problem for problem, _ in kept], dropped) == ([PROBLEM], 2)
    assert tokenized == [builder.text(PROBLEM)]
    with pytest.raises(ValueError, match="all 1 prompts are longer, the shortest has at least 101 tokens"):
        data.build_prompts([huge], builder, max_prompt_tokens=100)


# --- conversations and chat templates --------------------------------------------------------------------------------

SYSTEM, ASKED = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1 + 1?"}
ANSWER, AGAIN = {"role": "assistant", "content": "2"}, {"role": "user", "content": "Twice?"}
PREFIX = {"role": "assistant", "content": "<|im_start|>So 1 "}
# Like a vision model's: each content is a list of parts.
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{{ part.text }}{% endfor %}<|im_end|>"
    "\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like Qwen3's: an empty <think> block when thinking is off.
THINKING = CHATML.removesuffix("{% endif %}") + (
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def conversation(*turns: dict[str, Any]) -> data.Problem:
    return data.Problem("t/0", "What is 1 + 1?", "2", "t", None, turns)


@pytest.mark.parametrize("chat_template", [CHATML, LLAMA, DATED, PARTS])
@pytest.mark.parametrize("turns", [(SYSTEM, ASKED), (ASKED, ANSWER, AGAIN), (SYSTEM, ASKED, ANSWER, AGAIN)])
def test_a_conversation_is_rendered_as_it_stands(chat_template: str, turns: tuple[dict[str, str], ...]) -> None:
    tokenizer = make_tokenizer(chat_template)
    builder = data.PromptBuilder(tokenizer, template="boxed", system_prompt="Think.", chat_template=True)
    given: Any = list(turns)
    if chat_template == PARTS:
        given = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    expected = tokenizer.apply_chat_template(
        given,
        tokenize=False,
        add_generation_prompt=True,
        date_string="26 Jul 2024",
    )
    assert builder.text(conversation(*turns)) == expected
    assert tokenizer.decode(builder.build(conversation(*turns))) == expected
    assert all(turn["content"] in expected for turn in turns) and "Think" not in expected and "boxed" not in expected


@pytest.mark.parametrize("chat_template", [CHATML, PARTS])
def test_an_assistants_prefix_is_continued(chat_template: str) -> None:
    tokenizer = make_tokenizer(chat_template)
    builder = data.PromptBuilder(tokenizer, template="dapo", system_prompt="default", chat_template=True)
    text, ids = builder.text(conversation(SYSTEM, ASKED, PREFIX)), builder.build(conversation(SYSTEM, ASKED, PREFIX))
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n<|im_start|>So 1 ") and tokenizer.decode(ids) == text
    assert ids.count(tokenizer.get_vocab()["<|im_start|>"]) == 4  # three turns, and the one that is meant


def test_control_tokens_in_a_conversation_are_text_unless_the_assistant_writes_them() -> None:
    tokenizer = make_tokenizer(CHATML)
    builder = data.PromptBuilder(tokenizer, template="plain", system_prompt="default", chat_template=True)
    system, user = ({"role": role, "content": "a <|im_end|> b"} for role in ("system", "user"))
    problem = conversation(system, user, PREFIX)
    assert builder.control_tokens_in(problem) == ["<|im_end|>"]
    ids = builder.build(problem)
    assert tokenizer.decode(ids) == builder.text(problem)
    ends, starts = (ids.count(tokenizer.get_vocab()[f"<|im_{each}|>"]) for each in ("end", "start"))
    assert (ends, starts) == (2, 4)


@pytest.mark.parametrize(
    ("chat_template", "chat", "message"),
    [
        (IGNORES_SYSTEM, True, "t/0: the model's chat template leaves out the system turn"),
        (REFUSES_SYSTEM, True, r"t/0: the model's chat template refuses these turns \(no system\)"),
        (CHATML, False, "chat_template: false cannot render the conversation t/0; set it to true"),
    ],
)
def test_a_turn_is_never_left_out(chat_template: str, chat: bool, message: str) -> None:
    builder = data.PromptBuilder(
        make_tokenizer(chat_template), template="plain", system_prompt="default", chat_template=chat
    )
    with pytest.raises(ValueError, match=message):
        builder.build(conversation(SYSTEM, ASKED))


def test_a_chat_template_that_reads_parts_renders_the_problem(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(PARTS)
    assert build(tokenizer, "plain", "default", True)[0] == USER
    assert data.stop_token_ids(save_model(tmp_path, None, None), tokenizer)[-1] == tokenizer.convert_tokens_to_ids(
        "<|im_end|>"
    )
    with pytest.raises(ValueError, match="chat template does not render the user turn"):
        build(
            make_tokenizer("{{ bos_token }}{% if add_generation_prompt %}<|Assistant|>{% endif %}"), "plain", None, True
        )


def test_variables_of_the_chat_template() -> None:
    def rendered(**variables: Any) -> str:
        return data.PromptBuilder(
            make_tokenizer(THINKING),
            template="plain",
            system_prompt="none",
            chat_template=True,
            chat_template_kwargs=variables,
        ).text(PROBLEM)

    assert rendered(enable_thinking=False) == f"{USER}<think>\n\n</think>\n\n"
    assert rendered(enable_thinking=True) == rendered() == USER
    for name in ("enable_thinkin", "tokenize"):
        with pytest.raises(ValueError, match=f"chat_template_kwargs: .* does not read '{name}'; remove it"):
            rendered(**{name: False})


# --- control tokens in a problem's text ------------------------------------------------------------------------------


@pytest.mark.parametrize("chat_template", [CHATML, LLAMA, R1, None])
@given(pieces=st.lists(st.sampled_from(["<|im_end|>", "<|im_start|>", "</s>", "<s>", "<|eot_id|>", "<", "|", "x \n"])))
@pytest.mark.promise("<|im_end|> and other control tokens in a problem")
def test_control_tokens_in_a_problem_are_text(chat_template: str | None, pieces: list[str]) -> None:
    tokenizer = make_tokenizer(chat_template)
    builder = data.PromptBuilder(
        tokenizer, template="plain", system_prompt="default", chat_template=chat_template is not None
    )
    problem = data.Problem("t/0", f"1{''.join(pieces)}2", "3", "t", None)
    innocent = data.Problem("t/1", "12", "3", "t", None)
    asked, plain = builder.build(problem), builder.build(innocent)
    # Byte for byte the text, with the control tokens of the template alone.
    assert str(tokenizer.decode(asked)) == builder.text(problem)
    assert [i for i in asked if i >= 256] == [i for i in plain if i >= 256]
    text = str(tokenizer.decode(plain))
    at = text.index("12") + 1
    assert builder.text(problem) == text[:at] + "".join(pieces) + text[at:]


def test_control_tokens_that_the_tokenizer_does_not_call_special() -> None:
    """The R1 distills' <|User|> is an added token and not special; a template that writes it gives it a meaning."""
    tokenizer = make_tokenizer(R1.replace("<|User|>", "<turn>"))
    tokenizer.add_tokens(["<turn>", "<tool>"])
    builder = data.PromptBuilder(tokenizer, template="plain", system_prompt="default", chat_template=True)
    problem = data.Problem("t/0", "a<turn>b<tool>c<|im_end|>d<turn>", "3", "t", None)
    assert builder.control_tokens_in(problem) == ["<turn>", "<|im_end|>"]
    vocabulary = tokenizer.get_vocab()
    ids = builder.build(problem)
    assert [ids.count(vocabulary[token]) for token in ("<turn>", "<tool>")] == [
        1,
        1,
    ]  # the template's, and a mere word
    assert builder.build_all([PROBLEM, problem]) == [builder.build(PROBLEM), ids]


def test_a_control_token_that_cannot_be_written_as_text_is_refused() -> None:
    """This tokenizer has its padding for every sign that it does not know."""
    builder = data.PromptBuilder(toy_tokenizer(), template="plain", system_prompt="default", chat_template=False)
    assert builder.build(data.Problem("t/0", "1<|endoftext|>2", "3", "t", None)).count(1) == 0
    with pytest.raises(ValueError, match=r"t/1: spells the control token <pad>, which this tokenizer cannot write as"):
        builder.build(data.Problem("t/1", "1<pad>2", "3", "t", None))


# --- stop ids --------------------------------------------------------------------------------------------------------


def save_model(folder: Path, generation: Any, config: Any) -> str:
    for name, eos in (("generation_config.json", generation), ("config.json", config)):
        if eos != "no file":
            (folder / name).write_text(json.dumps({"eos_token_id": eos, "temperature": 0.6}))
    return str(folder)


def test_stop_ids_come_from_all_four_places_once(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(CHATML)  # tokenizer EOS </s>, but turns end with <|im_end|>
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "</s>", "<|im_end|>", "<|eot_id|>")}
    model = save_model(tmp_path, [ids["<|eot_id|>"], ids["</s>"]], ids["<s>"])
    assert data.stop_token_ids(model, tokenizer) == [ids["<|eot_id|>"], ids["</s>"], ids["<s>"], ids["<|im_end|>"]]


@pytest.mark.parametrize(
    ("chat_template", "end"), [(LLAMA, "<|eot_id|>"), (R1, "</s>"), (CHATML, "<|im_end|>"), (None, None)]
)
def test_the_chat_templates_end_of_turn_is_a_stop(tmp_path: Path, chat_template: str | None, end: str | None) -> None:
    tokenizer = make_tokenizer(chat_template)
    stops = data.stop_token_ids(save_model(tmp_path, "no file", None), tokenizer)
    expected = [tokenizer.eos_token_id] + ([tokenizer.convert_tokens_to_ids(end)] if end not in (None, "</s>") else [])
    assert stops == expected


def test_an_end_of_turn_that_is_plain_text_is_no_stop(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.content }} END {% endfor %}")
    assert data.stop_token_ids(save_model(tmp_path, None, None), tokenizer) == [tokenizer.eos_token_id]


def test_stop_ids_that_cannot_be(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(None)
    with pytest.raises(ValueError, match=r"EOS ids \[151645\] are not in the tokenizer"):
        data.stop_token_ids(save_model(tmp_path, [1], 151645), tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS id"):
        data.stop_token_ids(save_model(tmp_path, None, None), tokenizer)


@pytest.mark.parametrize("eos", ["<|im_end|>", ["<|im_end|>"], 1.5, True, {"a": 1}])
@pytest.mark.promise("eos_token_id is a string")
def test_an_eos_id_that_is_no_id(tmp_path: Path, eos: Any) -> None:
    with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id is .*; an id, a whole number"):
        data.stop_token_ids(save_model(tmp_path, eos, None), make_tokenizer(None))


@pytest.mark.promise("a model file with invalid JSON")
def test_a_broken_configuration_is_named(tmp_path: Path) -> None:
    model = save_model(tmp_path, None, None)
    for content, told in ((b'{"a": }', "Expecting value"), (b"\xff", "can't decode"), (b"[1]", "list found")):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match=f"{tmp_path}/config.json: .*{told}.*get the file again"):
            data.stop_token_ids(model, make_tokenizer(None))


def test_vocabulary_size_counts_to_the_largest_id() -> None:
    tokenizer = make_tokenizer(None)
    assert data.vocabulary_size(tokenizer) == 256 + 9
    tokenizer.add_tokens(["<extra>"])
    assert data.vocabulary_size(tokenizer) == 256 + 10
