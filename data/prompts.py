r"""Prompt builder, shared by training and evaluation, and stop token ids of a model.

    builder = PromptBuilder(tokenizer, template="dapo", system_prompt="default", chat_template=True)
    kept, dropped = build_prompts(problems, builder, max_prompt_tokens=1024)

To add a prompt, add an entry to TEMPLATES.
"""

import datetime
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.formats import DAPO_PREFIX, DAPO_SUFFIX
from data.problem import Problem
from data.tables import read_json_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BOXED = r"Please reason step by step, and put your final answer within \boxed{}."
# A fixed date: some chat templates write the current date into the system turn, so prompts would change every day.
_DATE = datetime.date(2024, 7, 26)
_PROBE = "Probe"  # placeholder message, to inspect the text of a chat template


@dataclass(frozen=True)
class Template:
    """Prompt template.

    user: user turn with the placeholder {problem}. system: system turn, "default" for that of the model, "none" for no
    turn. whole: the text is the whole prompt and cannot be used with a chat template. source: publication.
    examples: (problem, response) pairs before the problem, as chat turns or as text.
    """

    user: str
    system: str
    whole: bool
    source: str
    examples: tuple[tuple[str, str], ...] = ()


FEW_SHOT = (
    ("Ann has 4 pens. She buys 3 more pens. How many pens does Ann have now?", r"4 + 3 = \boxed{7}"),
    ("What is 9 - 5?", r"9 - 5 = \boxed{4}"),
    ("Eva has 3 bags with 5 eggs each. How many eggs does Eva have?", r"3 * 5 = \boxed{15}"),
)

TEMPLATES: dict[str, Template] = {
    "dapo": Template(DAPO_PREFIX + "{problem}" + DAPO_SUFFIX, "default", False, "DAPO-Math-17k, the paper's runs"),
    "boxed": Template("{problem}", _BOXED, False, "Qwen2.5-Math, qwen25-math-cot"),
    "boxed_verl": Template(
        "{problem} Let's think step by step and output the final answer within \\boxed{{}}.",
        "default",
        False,
        "verl, MATH preprocessing",
    ),
    "r1": Template("{problem}\n" + _BOXED.replace("{}", "{{}}"), "none", False, "DeepSeek-R1 model card"),
    "r1_zero": Template(
        "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The "
        "Assistant first thinks about the reasoning process in the mind and then provides the User with the answer. "
        "The reasoning process is enclosed within <think> </think> and answer is enclosed within <answer> </answer> "
        "tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>.\n"
        "User: {problem}\nAssistant: <think>",
        "none",
        True,
        "DeepSeek-R1-Zero, as used for base models in arXiv 2503.20783",
    ),
    "plain": Template("{problem}", "default", False, "the problem alone; the synthetic task"),
    "few_shot": Template("{problem}", "none", False, "three solved problems, for small models; ours", FEW_SHOT),
}


class PromptBuilder:
    """Builder of prompt text and token ids, the same for training and evaluation.

    template: a name of TEMPLATES.
    system_prompt: "default" (or None): the template's system text, else that of the model's chat template, which may
        insert one (Qwen2.5 does). "none": no system turn, not even Qwen2.5's. Any other text is the system turn.
    chat_template: render with the tokenizer's chat template. False: the bare text, after the system text if any.
    chat_template_kwargs: additional variables of the chat template, such as {"enable_thinking": False}.

    A conversation (`Problem.messages`) is rendered without template and system_prompt.

    Control tokens in a problem are encoded as text: for `<|im_end|>`, `build` returns the ids of its characters instead
    of the token, which would end the turn. Control tokens are special tokens of the tokenizer, and added tokens that
    the chat template writes.

    Raises ValueError for an unknown template and for options that conflict with each other or with the tokenizer.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        template: str,
        system_prompt: str | None,
        chat_template: bool,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if template not in TEMPLATES:
            raise ValueError(f"prompt_template: {template!r} is not known; use one of {', '.join(TEMPLATES)}")
        chosen = TEMPLATES[template]
        if chosen.whole and chat_template:
            raise ValueError(
                f"prompt_template: {template!r} is a whole prompt for base models; set chat_template: false"
            )
        if chat_template and not tokenizer.chat_template:
            raise ValueError("chat_template: the tokenizer has none; set it to false, or use an instruct model")
        if system_prompt == "none" and chosen.system not in ("default", "none"):
            raise ValueError(
                f"prompt_template: {template!r} has its instruction in the system turn, which system_prompt: none "
                "removes; use r1 or boxed_verl, which have it in the user turn"
            )
        self._tokenizer: Any = tokenizer
        self._user = chosen.user
        self._examples = [
            {"role": role, "content": text}
            for problem, response in chosen.examples
            for role, text in (("user", chosen.user.format(problem=problem)), ("assistant", response))
        ]
        self._system = chosen.system if system_prompt in ("default", None) else system_prompt
        self._chat = chat_template
        dates = {"date_string": f"{_DATE:%d %b %Y}", "strftime_now": _DATE.strftime}
        self._arguments = {**dates, **(chat_template_kwargs or {})}
        for key in chat_template_kwargs or {}:
            if chat_template and not re.search(rf"\b{re.escape(key)}\b", str(tokenizer.chat_template)):
                raise ValueError(f"chat_template_kwargs: the model's chat template does not read {key!r}; remove it")
        self._parts = chat_template and _wants_parts(tokenizer, self._arguments)
        self._system_turn = self._find_system_turn() if chat_template and self._system == "none" else ""
        first = [] if chat_template else self._tokenizer(_PROBE)["input_ids"][:1]
        self._bos = [token for token in first if token == tokenizer.bos_token_id]  # if the tokenizer adds it
        self.longest_token = max(map(len, tokenizer.get_vocab()))  # in characters, or in bytes if byte-level
        added: dict[int, Any] = self._tokenizer.added_tokens_decoder
        around = self._encode([self.text(Problem("", _PROBE, "", "", None))])[0]
        control = [token.content for i, token in added.items() if token.special or i in around]
        self._control = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or "(?!)")

    def text(self, problem: Problem) -> str:
        """Return the prompt as text, with a BOS only if the chat template writes one."""
        if problem.messages:
            return self._conversation(problem)
        turns = [*self._examples, {"role": "user", "content": self._user.format(problem=problem.problem)}]
        if not self._chat:
            system = "" if self._system in ("default", "none") else f"{self._system}\n\n"
            if not self._examples:
                return system + turns[0]["content"]
            return system + "".join(turn["content"] + ("\n\n" if i % 2 else "\n") for i, turn in enumerate(turns))
        if self._system == "default" or (self._system == "none" and not self._system_turn):
            return self._render(turns)
        if self._system != "none":
            return self._render([{"role": "system", "content": self._system}, *turns])
        rendered = self._render([{"role": "system", "content": _PROBE}, *turns])
        assert rendered.startswith(self._system_turn), "the chat template's system turn depends on the user turn"
        rest = rendered.removeprefix(self._system_turn)
        bos = self._tokenizer.bos_token
        bos = bos if bos and self._system_turn.startswith(bos) else ""
        return rest if rest.startswith(bos) else bos + rest  # SmolLM2's BOS also opens every turn

    def _conversation(self, problem: Problem) -> str:
        """Render a conversation with the chat template. The response continues a final assistant turn.

        Raises ValueError if the chat template omits a turn.
        """
        turns = list(problem.messages)
        if not self._chat:
            raise ValueError(f"chat_template: false cannot render the conversation {problem.id}; set it to true")
        try:
            rendered = self._render(turns, "continue" if turns[-1]["role"] == "assistant" else "respond")
        except ValueError as error:
            raise ValueError(f"{problem.id}: {error}") from None
        for turn in turns:
            if turn["role"] != "assistant" and turn["content"].strip() not in rendered:
                raise ValueError(f"{problem.id}: the model's chat template leaves out the {turn['role']} turn")
        return rendered

    def build(self, problem: Problem) -> list[int]:
        """Return the prompt as token ids."""
        return self.build_all([problem])[0]

    def build_all(self, problems: Sequence[Problem]) -> list[list[int]]:
        """Return the token ids of all prompts, tokenized together, which is many times faster."""
        rows = self._encode([self.text(problem) for problem in problems])
        rows = [
            self._as_text(problem) if self.control_tokens_in(problem) else row
            for problem, row in zip(problems, rows, strict=True)
        ]
        return [self._bos + row for row in rows]

    def control_tokens_in(self, problem: Problem) -> list[str]:
        """Return the distinct control tokens in a problem's text. In assistant turns they are intended and omitted."""
        texts = [turn["content"] for turn in problem.messages if turn["role"] != "assistant"] or [problem.problem]
        return list(dict.fromkeys(token for text in texts for token in self._control.findall(text)))

    def _as_text(self, problem: Problem) -> list[int]:
        """Return the ids of a prompt whose problem contains control tokens, encoded as text.

        The text is split inside each control token, so that the tokenizer does not see it. Raises ValueError if the ids
        contain a control token anyway.
        """
        text = self.text(problem)
        mark = next(sign for sign in map(chr, range(0xE000, 0xF900)) if sign not in text)  # Unicode private use area

        def replaced(change: Callable[[re.Match[str]], str]) -> str:
            messages = tuple(
                turn if turn["role"] == "assistant" else turn | {"content": self._control.sub(change, turn["content"])}
                for turn in problem.messages
            )
            return self.text(replace(problem, problem=self._control.sub(change, problem.problem), messages=messages))

        pieces = replaced(lambda match: match[0][0] + mark + match[0][1:]).split(mark)
        ids = [token for row in self._encode(pieces) for token in row]
        (others,) = self._encode([replaced(lambda _: mark)])
        for token in self.control_tokens_in(problem):
            id = self._tokenizer.convert_tokens_to_ids(token)
            if ids.count(id) != others.count(id):
                raise ValueError(
                    f"{problem.id}: spells the control token {token}, which this tokenizer cannot write as text; take "
                    "the problem out"
                )
        return ids

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Tokenize without special tokens: the chat template may already write a BOS."""
        return [list(row) for row in self._tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []

    def _render(self, turns: list[dict[str, Any]], end: str = "respond") -> str:
        return _render(self._tokenizer, turns, end, self._parts, self._arguments)

    def _find_system_turn(self) -> str:
        """Return the chat template's text for a system message, including BOS. Removing it leaves no system turn.

        Returns "" if the template rejects or ignores system messages, since it then writes no system turn.
        """
        system, user = {"role": "system", "content": _PROBE}, {"role": "user", "content": "?"}
        try:
            both = self._render([system, user])
        except ValueError:
            return ""
        if _PROBE not in both:
            return ""
        try:
            turn = self._render([system], "stop")
        except ValueError:
            turn = ""
        if _PROBE not in turn or not both.startswith(turn):
            raise ValueError(
                "system_prompt: none cannot be had with this model's chat template, which does not write its system "
                "turn on its own: use system_prompt: default, or a text"
            )
        return turn


def build_prompts(
    problems: Sequence[Problem], builder: PromptBuilder, *, max_prompt_tokens: int
) -> tuple[list[tuple[Problem, list[int]]], int]:
    """Return (problems with their token ids, number dropped). Prompts longer than the limit are dropped, not truncated.

    A problem is dropped without tokenization if it exceeds the limit even with the longest token of the vocabulary.
    Raises ValueError if no prompt is left.
    """
    most = max_prompt_tokens * builder.longest_token
    short = [each for each in problems if (sum(len(t["content"]) for t in each.messages) or len(each.problem)) <= most]
    built = list(zip(short, builder.build_all(short), strict=True))
    short_enough = [(problem, ids) for problem, ids in built if len(ids) <= max_prompt_tokens]
    if not short_enough:
        shortest = min((len(ids) for _, ids in built), default=max_prompt_tokens + 1)
        raise ValueError(
            f"max_prompt_tokens {max_prompt_tokens}: all {len(problems)} prompts are longer, the shortest has at least "
            f"{shortest} tokens; raise it"
        )
    return short_enough, len(problems) - len(short_enough)


def asks_answer_line(builder: PromptBuilder, problems: Iterable[Problem]) -> bool:
    """Return True if any prompt asks for a line "Answer: ...", which the reward answer_line requires."""
    return any(re.search(r"answer\s*:", builder.text(problem), re.IGNORECASE) for problem in problems)


def stop_token_ids(model: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return all ids that end a response, without duplicates. model: a folder or hub id.

    In this order: the EOS ids of generation_config.json and config.json, the tokenizer's EOS, and the token that ends
    an assistant turn in the chat template. A base model's EOS often differs from the end-of-turn token, and Llama-3
    lists two EOS ids. With a missing id, responses run on to the length limit.
    Raises ValueError if there is no id, or for an id that is not an integer or not in the tokenizer.
    """
    ids_in_order: list[int] = []
    for file in ("generation_config.json", "config.json"):
        eos = _read_config(model, file).get("eos_token_id")
        ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if not all(type(each) is int for each in ids):
            raise ValueError(f"{model}: {file}: eos_token_id is {eos!r:.80}; an id, a whole number, or a list of them")
        ids_in_order += ids
    if tokenizer.eos_token_id is not None:
        ids_in_order.append(int(tokenizer.eos_token_id))  # pyright: ignore[reportArgumentType]  (one id, not several)
    ids_in_order += _chat_end(tokenizer)
    stops = list(dict.fromkeys(ids_in_order))
    if not stops:
        raise ValueError(f"{model}: no EOS id in its generation_config.json, config.json or tokenizer; set one of them")
    strange = [stop for stop in stops if not 0 <= stop < vocabulary_size(tokenizer)]
    if strange:
        raise ValueError(f"{model}: EOS ids {strange} are not in the tokenizer ({vocabulary_size(tokenizer)} ids)")
    return stops


def vocabulary_size(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the tokenizer's largest id plus 1.

    Models often have more rows (Qwen2.5: 151,936 for 151,665 ids). Engine and trainer must mask the additional ids,
    which have no text.
    """
    return max(tokenizer.get_vocab().values()) + 1


def token_text(tokenizer: Any, token: int) -> str:
    """Return the text of one token; for a part of a character, its bytes in hex, such as "<F0 9F>"."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    text = tokenizer.decode([token])
    if "\N{REPLACEMENT CHARACTER}" not in text:
        return text
    letters = tokenizer.convert_ids_to_tokens(token)
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}  # byte-level BPE
    if not byte_of.keys() >= set(letters):
        return text
    return f"<{' '.join(f'{byte_of[letter]:02X}' for letter in letters)}>"


def _render(
    tokenizer: Any, turns: list[dict[str, Any]], end: str, parts: bool, arguments: Mapping[str, Any] | None
) -> str:
    """Render turns with the chat template. end: respond (open an assistant turn), continue (the last turn) or stop.

    parts: pass each content as a list of one text part. Raises ValueError if the template rejects the turns.
    """
    from jinja2 import TemplateError

    if parts:
        turns = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    ending = {"add_generation_prompt": end == "respond", "continue_final_message": end == "continue"}
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, **ending, **(arguments or {}))
    except TemplateError as error:
        raise ValueError(f"the model's chat template refuses these turns ({error})") from None


def _wants_parts(tokenizer: Any, arguments: Mapping[str, Any] | None = None) -> bool:
    """Return True if the chat template needs contents as lists of parts. Raises ValueError if neither form works."""
    turns = [{"role": "user", "content": _PROBE}]
    for parts in (False, True):
        if _PROBE in _render(tokenizer, turns, "respond", parts, arguments):
            return parts
    raise ValueError("the model's chat template does not render the user turn; correct it, or set chat_template: false")


def _chat_end(tokenizer: Any) -> list[int]:
    """Return the special token directly after an assistant's message in the chat template; [] if there is none."""
    if not tokenizer.chat_template:
        return []
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    tail = _render(tokenizer, turns, "stop", _wants_parts(tokenizer), None).rpartition(_PROBE)[2]
    first = tokenizer(tail, add_special_tokens=False)["input_ids"][:1]
    return [token for token in first if token in tokenizer.all_special_ids or token in tokenizer.added_tokens_decoder]


def _read_config(model: str, file: str) -> dict[str, Any]:
    """Load a JSON file of a model; {} if it does not exist. Raises ValueError if it is not a JSON object."""
    from transformers.utils.hub import cached_file

    path = cached_file(model, file, _raise_exceptions_for_missing_entries=False)
    return {} if path is None else read_json_object(Path(path))
