"""Recognise a row of the usual instruction and preference data sets and make it messages, as TRL and chat templates read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

Message = dict[str, str]
Kind = Literal["conversations", "preferences"]

_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    "system": "system",
}
"""Roles by the names that data sets give them."""
_TURN = re.compile(r"\n\n(Human|Assistant): ?")


class BadRowError(ValueError):
    """A row is not usable; the text is the reason."""


class Format(NamedTuple):
    """A form of rows.

    Attributes:
        name: The data set or program that it is known from.
        fields: The fields that tell it from others.
        kind: What its rows hold.
        convert: Makes a row for TRL.
    """

    name: str
    fields: tuple[str, ...]
    kind: Kind
    convert: Callable[[Mapping[str, Any]], dict[str, list[Message]]]


def format_of(row: Mapping[str, Any]) -> Format:
    """Return the first format whose fields the row has.

    Raises:
        BadRowError: There is none.
    """
    for each in FORMATS:
        if all(row.get(field) is not None for field in each.fields):
            return each
    known = "; ".join(f"{each.name}: {', '.join(each.fields)}" for each in FORMATS)
    raise BadRowError(f"unknown fields {', '.join(map(str, row)) or '(none)'}; known are {known}")


# ---- messages -----------------------------------------------------------------------------------------------------


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise BadRowError(f"{what} is of type {type(value).__name__}, not a text")
    return value


def _message(turn: Any) -> Message:
    """Return one message of a list in the form of OpenAI (role, content) or ShareGPT (from, value)."""
    if not isinstance(turn, Mapping):
        raise BadRowError(f"a message is of type {type(turn).__name__}, not an object")
    named = str(turn.get("role", turn.get("from")))
    if named.lower() not in _ROLES:
        raise BadRowError(f"a message has the role {named!r}; known are {', '.join(_ROLES)}")
    return {
        "role": _ROLES[named.lower()],
        "content": _text(turn.get("content", turn.get("value")), f"a message of {named}"),
    }


def _messages(turns: Any, system: Any = None) -> list[Message]:
    if not isinstance(turns, list):
        raise BadRowError(f"the conversation is of type {type(turns).__name__}, not a list")
    found = [_message(turn) for turn in turns]
    if system:
        found.insert(0, {"role": "system", "content": _text(system, "the system prompt")})
    return found


def _conversation(messages: list[Message]) -> dict[str, list[Message]]:
    """Return a row of a conversation in which user and assistant take turns, the user first and the assistant last.

    What comes before the first message of the user and after the last of the assistant is left out.
    """
    system = [each for each in messages[:1] if each["role"] == "system"]
    turns = messages[len(system) :]
    while turns and turns[0]["role"] == "assistant":
        turns = turns[1:]
    while turns and turns[-1]["role"] == "user":
        turns = turns[:-1]
    if not turns:
        raise BadRowError("there is no answer of the assistant to a user")
    for place, each in enumerate(turns):
        wanted = ("user", "assistant")[place % 2]
        if each["role"] != wanted:
            raise BadRowError(f"message {place + 1 + len(system)} is of {each['role']}, but {wanted} would be next")
        if not each["content"].strip():
            raise BadRowError(f"message {place + 1 + len(system)} is empty")
    return {"messages": system + turns}


def _pair(question: str, answer: str, system: Any = None, history: Any = ()) -> dict[str, list[Message]]:
    turns: list[Message] = []
    for earlier in history or ():
        if not isinstance(earlier, list | tuple) or len(earlier) != 2:
            raise BadRowError("history is not a list of pairs of texts")
        turns += [_said("user", earlier[0]), _said("assistant", earlier[1])]
    head = [_said("system", system)] if system else []
    return _conversation([*head, *turns, _said("user", question), _said("assistant", answer)])


def _said(role: str, text: Any) -> Message:
    return {"role": role, "content": _text(text, f"the text of the {role}")}


# ---- instruction data ---------------------------------------------------------------------------------------------


def _openai(row: Mapping[str, Any]) -> dict[str, list[Message]]:
    return _conversation(_messages(row["messages"], row.get("system")))


def _sharegpt(row: Mapping[str, Any]) -> dict[str, list[Message]]:
    return _conversation(_messages(row["conversations"], row.get("system")))


def _firefly_turns(row: Mapping[str, Any]) -> dict[str, list[Message]]:
    turns = []
    for each in row["conversation"]:
        if not isinstance(each, Mapping) or not {"human", "assistant"} <= each.keys():
            raise BadRowError("a turn has no human and assistant")
        turns += [_said("user", each["human"]), _said("assistant", each["assistant"])]
    return _conversation(turns)


def _alpaca(row: Mapping[str, Any]) -> dict[str, list[Message]]:
    more = row.get("input") or ""
    question = "\n".join(filter(None, (_text(row["instruction"], "instruction"), _text(more, "input"))))
    return _pair(question, row["output"], row.get("system"), row.get("history"))


# ---- preference data ----------------------------------------------------------------------------------------------


def _preference(prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> dict[str, list[Message]]:
    if chosen == rejected:
        raise BadRowError("the chosen and the rejected answer are the same")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if [each["role"] for each in answer[-1:]] != ["assistant"]:
            raise BadRowError(f"the {name} answer does not end with the assistant")
    if [each["role"] for each in prompt[-1:]] != ["user"]:
        raise BadRowError("the prompt does not end with the user")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _answers(row: Mapping[str, Any]) -> tuple[list[Message], list[Message]]:
    def answer(value: Any) -> list[Message]:
        if isinstance(value, str):
            return [_said("assistant", value)]
        return [_message(value)] if isinstance(value, Mapping) else _messages(value)

    return answer(row["chosen"]), answer(row["rejected"])


def _sharegpt_preference(row: Mapping[str, Any]) -> dict[str, list[Message]]:
    return _preference(_messages(row["conversations"], row.get("system")), *_answers(row))


def _prompted(row: Mapping[str, Any]) -> dict[str, list[Message]]:
    """A prompt as a text or messages; answers as texts, messages, or whole conversations that begin with the prompt."""
    prompt = [_said("user", row["prompt"])] if isinstance(row["prompt"], str) else _messages(row["prompt"])
    if row.get("system"):
        prompt.insert(0, _said("system", row["system"]))
    chosen, rejected = _answers(row)
    if len(chosen) > 1 and len(rejected) > 1:
        return _whole(chosen, rejected)
    return _preference(prompt, chosen, rejected)


def _whole(chosen: list[Message], rejected: list[Message]) -> dict[str, list[Message]]:
    same = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    return _preference(chosen[:same], chosen[same:], rejected[same:])


def _dialogues(row: Mapping[str, Any]) -> dict[str, list[Message]]:
    """Two whole conversations, as messages or as one text with ``Human:`` and ``Assistant:`` (Anthropic's HH-RLHF)."""
    return _whole(*(_dialogue(row[name]) for name in ("chosen", "rejected")))


def _dialogue(value: Any) -> list[Message]:
    if not isinstance(value, str):
        return _messages(value)
    parts = _TURN.split(value)
    if len(parts) < 5 or parts[0].strip():
        raise BadRowError(r"the text has no turns \n\nHuman: and \n\nAssistant:")
    return list(_turns(parts[1:]))


def _turns(parts: list[str]) -> Iterator[Message]:
    for speaker, text in zip(parts[::2], parts[1::2], strict=True):
        yield _said({"Human": "user", "Assistant": "assistant"}[speaker], text.strip())


FORMATS = (
    Format("ShareGPT with preferences", ("conversations", "chosen", "rejected"), "preferences", _sharegpt_preference),
    Format("prompt with preferences", ("prompt", "chosen", "rejected"), "preferences", _prompted),
    Format("conversations with preferences", ("chosen", "rejected"), "preferences", _dialogues),
    Format("OpenAI", ("messages",), "conversations", _openai),
    Format("ShareGPT", ("conversations",), "conversations", _sharegpt),
    Format("Firefly, several turns", ("conversation",), "conversations", _firefly_turns),
    Format("Firefly", ("input", "target"), "conversations", lambda row: _pair(row["input"], row["target"])),
    Format("Alpaca", ("instruction", "output"), "conversations", _alpaca),
    Format(
        "prompt and completion",
        ("prompt", "completion"),
        "conversations",
        lambda row: _pair(row["prompt"], row["completion"], row.get("system")),
    ),
    Format(
        "prompt and response",
        ("prompt", "response"),
        "conversations",
        lambda row: _pair(row["prompt"], row["response"], row.get("system")),
    ),
)
"""Known formats, the ones with more telling fields first."""
