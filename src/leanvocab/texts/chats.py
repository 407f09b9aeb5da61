"""Chats as their template writes them, and which parts of that text are replies to learn."""

import inspect
import json
import re
from collections.abc import Collection
from functools import cached_property
from importlib.util import find_spec
from itertools import chain, pairwise
from typing import Any

from leanvocab.errors import DataError, first_line, shortened

Span = tuple[str, bool]
"""A part of an example's text, and whether it is learned."""

Tally = dict[str, int]
"""How many rows had which of the fates."""

_ROLES = {"human": "user", "gpt": "assistant"}

Reply = tuple[int, int]
"""Start and end of a reply in the text of a chat."""
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatWriter:
    """Writes chats by their tokenizer's template, cut where the assistant's replies begin and end.

    The replies are those that the template marks itself ({% generation %}); or else what it writes after the beginning of a
    chat that asks for one. A template that writes earlier replies in another way than the last one (without their reasoning,
    say) gives way to TRL's training template, where TRL is installed and has one for it; or else the last reply alone is
    learned.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.template = tokenizer.get_chat_template()
        self.tools: list[Any] | None = None  # those that the chats from here on are offered
        self.values: dict[str, Any] = {}  # what the template is told beside them

    def spans(self, messages: list[dict[str, Any]], max_length: int, tally: Tally | None = None) -> list[Span]:
        """The parts of a chat; `max_length` bounds how many replies are looked for, `tally` notes the ways that are no plain one.

        Raises:
            DataError: the template refuses the chat, or its replies cannot be found in what it writes.
        """
        text = self.written(messages)
        if all(message["role"] != "assistant" for message in messages):
            return [(text, False)]
        if replies := self._marked(messages, self.template, text) or self._after_beginnings(messages, max_length, text):
            return _cut(text, replies)
        spans, way = self._by_training_template(messages), "by TRL"
        if not spans:
            spans, way = self._last_reply(messages), "last reply"
        if tally is not None:
            tally[way] += 1
        return spans

    def unused(self, values: Collection[str]) -> list[str]:
        """Those of the names that the template says nowhere."""
        return [name for name in values if not re.search(rf"\b{re.escape(name)}\b", self.template)]

    def written(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """What the template writes, whole; raises DataError where it refuses the chat."""
        try:
            told = self.values | options
            return str(self.tokenizer.apply_chat_template(messages, self.tools, tokenize=False, **told))
        except Exception as error:  # whatever the template raises, and jinja of what it does not find
            raise DataError(
                f"the tokenizer's chat template refuses a chat of the roles {', '.join(_roles(messages))} that begins with "
                f"{shortened(messages[0])}: {first_line(error)}"
            ) from error

    def _marked(self, messages: list[dict[str, Any]], template: str, text: str) -> list[Reply]:
        """The replies that a template marks; none where it marks none."""
        if not _MARK.search(template):
            return []
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = render_jinja_template(  # texts, and what is marked in each
            conversations=[messages],
            tools=self.tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map | self.values,
        )
        (written,), (marked,) = rendered
        return [(start, end) for start, end in marked if start < end] if written == text else []

    def _after_beginnings(self, messages: list[dict[str, Any]], max_length: int, text: str) -> list[Reply]:
        """The replies by what is written before and after each; none where a beginning of the chat is written otherwise."""
        replies: list[Reply] = []
        for at, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if len(replies) > max_length:  # a reply has a token at least: what follows is cut off
                break
            before, after = self._before(messages, at), self._beginning(messages[: at + 1])
            if before is None or after is None or not (text.startswith(after) and after.startswith(before)):
                return []
            replies.append((len(before), len(after)))
        return replies

    def _before(self, messages: list[dict[str, Any]], at: int) -> str | None:
        """What is written before the message at a position, if it is a reply."""
        if at:
            return self._beginning(messages[:at], add_generation_prompt=True)
        # No template writes an empty chat: what asks for a reply is what is added after the first one, and stands before it.
        alone, asked = self._beginning(messages[:1]), self._beginning(messages[:1], add_generation_prompt=True)
        if alone is None or asked is None or not asked.startswith(alone):
            return None
        before, question, _ = alone.partition(asked.removeprefix(alone) or "\0")
        return before + question if question else None

    def _beginning(self, messages: list[dict[str, Any]], **options: Any) -> str | None:
        try:
            return self.written(messages, **options)
        except DataError:  # the template takes the whole chat, and may refuse a part of it
            return None

    def _by_training_template(self, messages: list[dict[str, Any]]) -> list[Span]:
        template = self._training_template
        text = self._beginning(messages, chat_template=template) if template else None
        replies = self._marked(messages, template, text) if template and text else []
        return _cut(text, replies) if text and replies else []

    @cached_property
    def _training_template(self) -> str | None:
        if find_spec("trl") is None:
            return None
        from trl.chat_template_utils import get_training_chat_template

        try:
            template = get_training_chat_template(self.tokenizer)
        except Exception:  # it has none for this template, and tries chats that a template may refuse
            return None
        return template if template and _MARK.search(template) else None

    def _last_reply(self, messages: list[dict[str, Any]]) -> list[Span]:
        last = max(at for at, role in enumerate(_roles(messages)) if role == "assistant")
        text, before = self._beginning(messages[: last + 1]), self._before(messages, last)
        if text is None or before is None or not text.startswith(before):
            raise DataError(
                "the tokenizer's chat template writes a beginning of a chat in another way than the chat itself, so that the "
                "replies cannot be found in it; mark them in the template ({% generation %} … {% endgeneration %}), give "
                "prompt and completion columns, or learn the whole chats (train_on_prompts)"
            )
        return [(before, False), (text[len(before) :], True)]


def template_values(value: Any, tokenizer: Any) -> dict[str, Any]:
    """What a chat template is told by name: an object, or JSON of one; null is told nothing.

    Raises:
        DataError: it is something else, or sets what is no value of the template but says how chats are written.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    values = parsed(value)
    if values is not None and not isinstance(values, dict):
        raise DataError(
            f"chat_template_kwargs holds {shortened(value)}; expected an object of names and values, or JSON of one"
        )
    taken = {
        *inspect.signature(tokenizer.apply_chat_template).parameters,
        *inspect.signature(render_jinja_template).parameters,
    }
    if wrong := sorted({*(values or ())} & (taken - {"documents"})):
        raise DataError(
            f"chat_template_kwargs sets {wrong[0]!r}, which is no value of a template, but one of how chats are written"
        )
    return values or {}


def as_messages(value: Any) -> Any:
    """A chat as messages of roles and contents, where it is one of speakers and values (ShareGPT's form)."""
    chat = parsed(value)
    return [_as_message(message) for message in chat] if isinstance(chat, list) else chat


def is_message(value: Any) -> bool:
    """True for what a template can write: a role with a content, or with calls of tools."""
    return isinstance(value, dict) and "role" in value and bool({"content", "tool_calls", "function_call"} & set(value))


def parsed(value: Any) -> Any:
    """What JSON says, as it says it; or what a table holds, without the keys that it fills with nulls.

    A table holds chats and tools as JSON where its rows have other keys than one another.
    """
    if not isinstance(value, str):
        return _without_nones(value)
    try:
        return json.loads(value) if value else None
    except ValueError:
        return value


def _without_nones(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nones(inner) for key, inner in value.items() if inner is not None}
    return [_without_nones(inner) for inner in value] if isinstance(value, list) else value


def _as_message(message: Any) -> Any:
    if not isinstance(message, dict) or message.get("role") is not None or not {"from", "value"} <= set(message):
        return message
    others = {key: value for key, value in message.items() if key not in ("from", "value")}
    return others | {"role": _ROLES.get(message["from"], message["from"]), "content": message["value"]}


def _roles(messages: list[dict[str, Any]]) -> list[str]:
    return [str(message["role"]) for message in messages]


def _cut(text: str, replies: list[Reply]) -> list[Span]:
    edges = [0, *chain.from_iterable(replies), len(text)]
    return [(text[start:end], number % 2 == 1) for number, (start, end) in enumerate(pairwise(edges))]
