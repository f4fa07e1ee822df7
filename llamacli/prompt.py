"""Messages to token ids: Llama 2 built token by token, other templates rendered, piped text fenced.

The Llama 2 format follows Meta's reference (facebookresearch/llama, generation.py, chat_completion): every turn
is tokenized by itself, with BOS before it and EOS after a finished one. Joining the turns to one string first
gives other ids, because SentencePiece puts a space before every text.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from time import strftime
from typing import Any, NamedTuple, Protocol

from llamacli.engine.recall import Recall
from llamacli.errors import InputTooLong, ModelError, UsageError
from llamacli.gguf import Header

INVISIBLE = "\u200b"  # zero-width space: breaks a tag and leaves the text readable
_LLAMA2_TAG = re.compile(r"\[/?INST\]|<</?SYS>>|</?s>")
_LLAMA2_VOCABULARY = range(32_000, 32_017)  # Llama 2, and Code Llama with its infill tokens
# FastChat's conversation template vicuna_v1.1, which LLaVA 1.5 was trained with.
_VICUNA_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions."
)
_VICUNA_TAG = re.compile(r"USER:|ASSISTANT:|</?s>")
_GAP = "\n[...]\n"
LONGEST_PIECE = 256  # characters that one token stands for at most, in any vocabulary: Llama 2's longest has 16


class Message(NamedTuple):
    role: str  # system, user or assistant
    content: str


class Format(StrEnum):
    """How a model wants to be spoken to."""

    LLAMA2 = "llama-2"
    VICUNA = "vicuna"  # LLaVA 1.5 is built on it
    TEMPLATE = "template"  # the file's own, in Jinja
    COMPLETION = "completion"  # a base model: it continues a text
    RAW = "raw"  # as the user wrote it


class Tokenizer(Protocol):
    bos: int
    eos: int
    adds_bos: bool

    def tokenize(self, text: str, *, parse_special: bool = False) -> array[int]: ...

    def name(self, token: int) -> str: ...

    def detokenize(self, tokens: array[int]) -> bytes: ...

    def spelt(self, tokens: array[int]) -> str: ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """What goes into the engine. `trim`: the answer comes with the template's own white space around it."""

    tokens: array[int]
    format: Format
    trim: bool = False


def format_of(header: Header, known: str | None = None) -> Format:
    """Which format a model file wants, by its chat template, or by its names where it has none.

    known   what the catalogue says of a model without a template

    Many Llama 2 files have no template (they are older than the key); llama.cpp then falls back to ChatML,
    which Llama 2 has never seen.
    """
    template = header.chat_template
    if template and not ("[INST]" in template and "<<SYS>>" in template):
        return Format.TEMPLATE
    speaks_llama2 = (
        header.architecture == "llama" and header.tokenizer_model == "llama" and header.n_vocab in _LLAMA2_VOCABULARY
    )
    if template:
        return Format.LLAMA2 if speaks_llama2 else Format.TEMPLATE
    if known in (Format.VICUNA, Format.COMPLETION) or (known == Format.LLAMA2 and speaks_llama2):
        return Format(known)
    finetune = header.metadata.get("general.finetune", "")
    names = f"{header.name or ''} {finetune} {header.path.name}"
    if re.search("vicuna|llava", names, re.IGNORECASE):
        return Format.VICUNA
    is_chat = re.search("chat|instruct", names, re.IGNORECASE)
    return Format.LLAMA2 if speaks_llama2 and is_chat else Format.COMPLETION


class PromptBuilder:
    """Builds the prompts of one model.

    recall   answers that it has given: in a conversation they stand with the tokens it has written them with
    """

    def __init__(
        self,
        header: Header,
        tokenizer: Tokenizer,
        *,
        raw: bool = False,
        known: str | None = None,
        recall: Recall | None = None,
    ) -> None:
        self._header = header
        self._recall = recall or Recall()
        self.tokenizer = tokenizer
        self.format = Format.RAW if raw else format_of(header, known)

    def build(self, messages: Sequence[Message]) -> Prompt:
        """Token ids of a conversation that ends with a user's message.

        Raises UsageError for a conversation that this model cannot be given.
        """
        _check_roles(messages)
        if not messages[-1].content.strip():
            raise UsageError("the prompt is empty")
        if self.format is Format.LLAMA2:
            return Prompt(llama2_tokens(messages, self.tokenizer, self._recall), self.format, trim=True)
        if self.format is Format.VICUNA:
            return Prompt(vicuna_tokens(messages, self.tokenizer, self._recall), self.format, trim=True)
        if self.format is Format.TEMPLATE:
            return Prompt(self._rendered(messages), self.format, trim=True)
        return Prompt(self._completed(messages), self.format)

    def continued(self, text: str) -> Prompt:
        """Token ids of a text that is to go on as it is, without a template. Control tokens in it are plain text.

        Raises UsageError for an empty text.
        """
        if not text:
            raise UsageError("the prompt is empty")
        return Prompt(self._with_bos(self.tokenizer.tokenize(text)), Format.COMPLETION)

    def shown(self, prompt: Prompt) -> str:
        """The prompt with its control tokens spelt out."""
        return self.tokenizer.spelt(prompt.tokens)

    def _completed(self, messages: Sequence[Message]) -> array[int]:
        """A text to continue. Only --raw is trusted to spell control tokens."""
        if len(messages) > 1:
            what = "--raw sends the prompt as it is" if self.format is Format.RAW else "this is a base model"
            raise UsageError(
                f"{what}: there is no place for a system prompt or earlier turns; put them into the prompt"
            )
        tokens = self.tokenizer.tokenize(messages[-1].content, parse_special=self.format is Format.RAW)
        return self._with_bos(tokens)

    def _rendered(self, messages: Sequence[Message]) -> array[int]:
        specials = [text for text in self._header.special_tokens() if len(text) > 1]
        pattern = re.compile("|".join(map(re.escape, specials)) or "(?!)")
        safe = [Message(m.role, neutralised(m.content, pattern)) for m in messages]
        text = self._text_of(safe)
        tokens, n_told = self._recalled(text, safe, pattern)
        return self._with_bos(tokens + self.tokenizer.tokenize(text[n_told:], parse_special=True))

    def _text_of(self, messages: Sequence[Message]) -> str:
        name = self.tokenizer.name
        return _render(self._header.chat_template or "", messages, name(self.tokenizer.bos), name(self.tokenizer.eos))

    def _recalled(self, text: str, messages: Sequence[Message], special: re.Pattern[str]) -> tuple[array[int], int]:
        """The longest beginning of a rendered conversation that ends with a known answer: its tokens, its characters.

        Only where a control token follows the answer: what follows is then tokenized as it would be in one piece.
        """
        tokens, n_told = array("i"), 0
        for i, message in enumerate(messages):
            if message.role != "assistant" or not self._recall.knows(message.content):
                continue
            before = self._text_of(messages[:i])
            answer = re.compile(rf"\s*{re.escape(message.content.strip())}\s*").match(text, len(before))
            if not text.startswith(before) or answer is None or not special.match(text, answer.end()):
                continue
            prompt = self._with_bos(tokens + self.tokenizer.tokenize(before[n_told:], parse_special=True))
            known = self._recall.continued(prompt, message.content)
            if known is not None:
                tokens, n_told = known, answer.end()
        return tokens, n_told

    def _with_bos(self, tokens: array[int]) -> array[int]:
        """Exactly one BOS where the vocabulary wants one."""
        if self.tokenizer.adds_bos and tokens[:1] != array("i", [self.tokenizer.bos]):
            tokens.insert(0, self.tokenizer.bos)
        return tokens


def llama2_tokens(messages: Sequence[Message], tokenizer: Tokenizer, recall: Recall) -> array[int]:
    """Llama 2 chat: `<s>[INST] user [/INST] answer </s>` for every turn, the last one open.

    A system prompt stands inside the first user text. Tags in the content are ordinary text to the
    vocabulary, so they are broken up: nobody's document can forge a turn.
    """
    system = ""
    if messages[0].role == "system":
        content = neutralised(messages[0].content, _LLAMA2_TAG)
        system = f"<<SYS>>\n{content}\n<</SYS>>\n\n"
        messages = messages[1:]
    tokens = array("i")
    for i in range(0, len(messages), 2):
        user = neutralised(messages[i].content, _LLAMA2_TAG)
        if i == 0:
            user = system + user
        text = f"[INST] {user.strip()} [/INST]"
        tokens.append(tokenizer.bos)
        if i + 1 == len(messages):
            tokens.extend(tokenizer.tokenize(text))
        else:
            answer = neutralised(messages[i + 1].content, _LLAMA2_TAG)
            known = recall.continued(tokens + tokenizer.tokenize(text), answer) if recall.knows(answer) else None
            tokens = known or tokens + tokenizer.tokenize(f"{text} {answer.strip()} ")
            tokens.append(tokenizer.eos)
    return tokens


def vicuna_tokens(messages: Sequence[Message], tokenizer: Tokenizer, recall: Recall) -> array[int]:
    """Vicuna 1.1: a system prompt, then `USER: user ASSISTANT: answer</s>` for every turn, the last one open."""
    system = _VICUNA_SYSTEM
    if messages[0].role == "system":
        system, messages = neutralised(messages[0].content, _VICUNA_TAG), messages[1:]
    tokens = array("i", [tokenizer.bos])
    text = f"{system} "
    for message in messages:
        content = neutralised(message.content, _VICUNA_TAG).strip()
        if message.role == "user":
            text += f"USER: {content} ASSISTANT:"
        else:
            known = recall.continued(tokens + tokenizer.tokenize(text), content) if recall.knows(content) else None
            tokens = known or tokens + tokenizer.tokenize(f"{text} {content}")
            tokens.append(tokenizer.eos)
            text = ""
    tokens.extend(tokenizer.tokenize(text))
    return tokens


def neutralised(text: str, tag: re.Pattern[str]) -> str:
    """The text with an invisible character inside every tag."""
    return tag.sub(lambda match: match[0][0] + INVISIBLE + match[0][1:], text)


def _check_roles(messages: Sequence[Message]) -> None:
    roles = [m.role for m in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns[-1] != "user" or turns != [("user", "assistant")[i % 2] for i in range(len(turns))]:
        raise UsageError(
            "a conversation is one system prompt at most, then user and assistant in turn, a user last; "
            f"not {', '.join(roles) or 'nothing'}"
        )


def _render(template: str, messages: Sequence[Message], bos: str, eos: str) -> str:
    """A Hugging Face chat template over these messages, in Jinja's sandbox: the template is somebody's download."""
    try:
        text: str = _compiled(template).render(
            messages=[m._asdict() for m in messages], bos_token=bos, eos_token=eos, add_generation_prompt=True
        )
        return text
    except UsageError:
        raise
    except Exception as error:  # the template is a program of somebody else's, and may fail in any way
        said = " ".join(str(error).split())[:200]
        raise ModelError(
            f"the model's chat template cannot be rendered ({type(error).__name__}: {said}): "
            "--raw sends your text without it"
        ) from error


@lru_cache(2)
def _compiled(template: str) -> Any:
    """A jinja2.Template."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: object) -> None:
        raise UsageError(f"the model's chat template refuses this conversation: {' '.join(str(message).split())}")

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = strftime
    return environment.from_string(template)


def with_document(document: str, instruction: str) -> str:
    """A piped document and what is asked of it: the document in a fence first, so that its KV can be reused.

    "{stdin}" in the instruction places the document there instead, without a fence.
    """
    if "{stdin}" in instruction:
        return instruction.replace("{stdin}", document)
    longest = max((len(run) for run in re.findall("`+", document)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{document}\n{fence}\n\n{instruction}"


def without_place(text: str) -> str:
    """Text that only happens to say {stdin}: it is to stay where it is."""
    return text.replace("{stdin}", f"{{{INVISIBLE}stdin}}")


@dataclass(frozen=True, slots=True)
class Fitted:
    """A prompt that fits. `n_input` and `n_kept` are tokens of the text that was to be cut, `text` is what is left."""

    prompt: Prompt
    n_input: int
    n_kept: int
    text: str


def room_for_answer(limit: int, max_tokens: int | None) -> int:
    """Tokens of the context that an input is to leave: what was asked for, half at most, or a quarter."""
    return min(max_tokens, limit // 2) if max_tokens else limit // 4


def fit(
    text: str, build: Callable[[str], Prompt], tokenizer: Tokenizer, *, room: int, limit: int, policy: str
) -> Fitted:
    """Build a prompt around a text, cutting the text token by token if it must be and may be.

    text      the part that may be cut: the document, or the prompt where there is none
    room      tokens the prompt should keep to, so that an answer fits as well
    limit     tokens the context holds; what reaches it is an error whatever the policy
    policy    error, head, tail or middle: what to keep

    Raises InputTooLong.
    """
    if policy == "error" and len(text) > limit * LONGEST_PIECE:
        raise _too_long(f"{len(text):,} characters", limit)
    prompt = build(text)
    if policy == "error" and len(prompt.tokens) >= limit:
        raise _too_long(f"{len(prompt.tokens):,} tokens", limit)
    tokens = tokenizer.tokenize(text)
    n_input = len(tokens)
    if policy == "error" or len(prompt.tokens) <= room:
        return Fitted(prompt, n_input, n_input, text)
    n_kept = n_input - (len(prompt.tokens) - room)
    while n_kept > 0:
        left = _cut(tokens, n_kept, policy, tokenizer)
        prompt = build(left)
        excess = len(prompt.tokens) - room
        if excess <= 0:
            return Fitted(prompt, n_input, n_kept, left)
        n_kept -= excess
    raise InputTooLong(
        f"the instruction and the system prompt alone leave no room for the input: the context holds {limit:,} "
        "tokens. Shorten them, or choose a larger --ctx-size"
    )


def _too_long(size: str, limit: int) -> InputTooLong:
    return InputTooLong(
        f"the input is {size}; the context holds {limit:,} tokens, the answer included. "
        "Shorten it, or choose --on-overflow head, tail, middle or map-reduce"
    )


def _cut(tokens: array[int], n_kept: int, policy: str, tokenizer: Tokenizer) -> str:
    def text(part: array[int]) -> str:
        # Half a character at the cut is dropped. The vocabulary's own first space is not part of the text.
        return tokenizer.detokenize(part).decode("utf-8", "ignore").removeprefix(" ")

    if policy == "head":
        return text(tokens[:n_kept])
    if policy == "tail":
        return text(tokens[len(tokens) - n_kept :])
    n_head = (n_kept + 1) // 2
    return text(tokens[:n_head]) + _GAP + text(tokens[len(tokens) - (n_kept - n_head) :])
