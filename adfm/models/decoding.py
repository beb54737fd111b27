"""Generation settings, the end of a completion, and the probability of its decision, for transformers and vLLM."""

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adfm.errors import AdfmError
from adfm.method import prompt, response
from adfm.params import Evaluate
from adfm.records import Label

if TYPE_CHECKING:
    from transformers import GenerationConfig

# Returns logits, or log-probabilities, of `Scorer.tokens` at a position of a completion.
Logits = Callable[[int], NDArray[np.floating]]
# Completions, and for each the probability of a defect: `None` where it has no clean letter.
Completions = tuple[list[str], list[float | None]]

STOP = "</answer>"  # where a completion ends


def until_stop(completion: str) -> str:
    """Cut off what follows the end of a completion: a last token may reach beyond it."""
    before, stop, _ = completion.partition(STOP)
    return before + stop


def generation_config(model_config: "GenerationConfig", suppressed: Sequence[int]) -> "GenerationConfig":
    """Return generation settings with only the tokens of `model_config` that frame a text, and without `suppressed`."""
    from transformers import GenerationConfig

    # Folders of the hub bring settings for chat, such as Qwen2.5-VL's repetition penalty of 1.05, and `generate` takes
    # over each of them that its caller leaves out (`GenerationMixin._prepare_generation_config`).
    return GenerationConfig(
        bos_token_id=model_config.bos_token_id,
        eos_token_id=model_config.eos_token_id,
        pad_token_id=model_config.pad_token_id,
        suppress_tokens=list(suppressed),
    )


class Fork(NamedTuple):
    """A place at which a completion becomes one of two answers."""

    tag: str  # right before it
    openings: dict[Label, tuple[str, ...]]  # what may follow the tag, without white space, which does not matter

    def after(self, text: str) -> int | None:
        """Return where the tag ends in `text`; `None` if it is missing."""
        tag = re.search(self.tag, text, re.IGNORECASE | re.ASCII)
        return tag.end() if tag else None

    def side(self, text: str) -> Label | None:
        """Return the answer that `text` becomes; `None` if it does not reach the fork, or follows neither side."""
        after = self.after(text)
        written = "" if after is None else _bare(text[after:])
        labels: list[Label] = [
            label
            for label, openings in self.openings.items()
            if written and any(opening.startswith(written) or written.startswith(opening) for opening in openings)
        ]
        return labels[0] if len(labels) == 1 else None

    def begun(self, text: str) -> str:
        """Return the end of `text` from the tag on, or the part of a tag that it ends with."""
        if (after := self.after(text)) is not None:
            return text[after - len(self.tag) :]
        lengths = range(min(len(self.tag), len(text)), 0, -1)
        return next((text[-n:] for n in lengths if text[-n:].lower() == self.tag[:n]), "")


def _bare(text: str) -> str:
    return "".join(text.split())


# The letter; and where target completions of the two labels differ before it, in the order of the text.
LETTER = Fork("<answer>", {label: (f"{letter}<", f"{letter.lower()}<") for letter, label in prompt.LETTERS.items()})
BRANCHES = tuple(
    Fork(f"<{stage}>", {label: tuple(map(_bare, texts)) for label, texts in openings.items()})
    for stage, openings in prompt.OPENINGS.items()
)


class Scorer:
    """Computes the probability that an answer is `anomalous` from the logits of the tokens that decide.

    Args:
        tokenizer: The model's tokenizer. All its tokens are read once, about a second for 150,000.

    Raises:
        AdfmError: The tokenizer cannot write the two letters, or writes both alike.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._sides: dict[tuple[str, str], dict[Label, NDArray[np.intp]]] = {}
        # A tokenizer may write the letter of `<answer>A</answer>` as `A`, ` A`, `a` or, as Qwen's does, as `>A`. So
        # tokens are compared by text: those that continue what is written to one answer with those that continue it to
        # the other. Decoded behind another token, since some decoders drop the white space that begins a text.
        anchor = tokenizer("<", add_special_tokens=False)["input_ids"][-1:]
        start = len(tokenizer.decode(anchor))
        texts = tokenizer.batch_decode([[*anchor, token] for token in range(len(tokenizer))], skip_special_tokens=True)
        self._texts = {token: text[start:] for token, text in enumerate(texts) if _decides(text[start:])}
        self.tokens = list(self._texts)  # that can decide, whose logits `letter` and `branch` read
        for letter, label in prompt.LETTERS.items():
            answer = f"<answer>{letter}</answer>"
            tokens = tokenizer(answer, add_special_tokens=False)["input_ids"]
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            at = self._position(tokens, text, LETTER)
            if at is None or tokens[at] not in [self.tokens[i] for i in self._split(tokens[:at], LETTER)[label]]:
                raise AdfmError(
                    f"model.name: the tokenizer writes {answer} as {text!r}, so that the letters A and B cannot be "
                    "told apart; take all files of a model from one place"
                )

    def score(self, settings: Evaluate, tokens: Sequence[int], completion: str, logits: Logits) -> float | None:
        """Return `branch` or `letter`, as `evaluate.score` says; with `evaluate.samples`, always `letter`."""
        read = self.branch if settings.score == "branch" and not settings.samples else self.letter
        return read(tokens, completion, logits)

    def letter(self, tokens: Sequence[int], completion: str, logits: Logits) -> float | None:
        """Return the probability of `A` against `B` at the letter; `None` if there is no clean letter.

        Args:
            tokens: The tokens of the completion, and perhaps some after it.
            completion: Their text, as `until_stop` gives it.
            logits: Those of `self.tokens`, at a position in `tokens`.
        """
        if response.parse(completion).predicted_label is None:
            return None
        odds = self._log_odds(tokens, completion, LETTER, logits)
        return None if odds is None else _probability(odds)

    def branch(self, tokens: Sequence[int], completion: str, logits: Logits) -> float | None:
        """As `letter`, but from where answers differ first, before the letter.

        The odds are the geometric mean of those at `BRANCHES` where this completion took one of the two sides. In words
        other than those of target completions it takes none: the result is then that of `letter`.
        """
        # Once a model has written its reasoning the letter is a formality; it is unsure where it chose what to reason.
        letter = self.letter(tokens, completion, logits)
        odds = [self._log_odds(tokens, completion, fork, logits) for fork in BRANCHES]
        taken = [value for value in odds if value is not None]
        return letter if letter is None or not taken else _probability(float(np.mean(taken)))

    def _log_odds(self, tokens: Sequence[int], text: str, fork: Fork, logits: Logits) -> float | None:
        """The log odds of the anomalous side of a fork; `None` if the text takes neither side."""
        at = self._position(tokens, text, fork)
        if at is None:
            return None
        values, sides = np.asarray(logits(at), np.float64), self._split(tokens[:at], fork)
        anomalous, normal = (np.logaddexp.reduce(values[sides[label]]) for label in ("anomalous", "normal"))
        if not np.isfinite(max(anomalous, normal)):  # a token that writes more than the fork, or was suppressed
            return None
        return float(np.clip(anomalous - normal, -700, 700))

    def _position(self, tokens: Sequence[int], text: str, fork: Fork) -> int | None:
        """Return the position of the token that writes the first character after the tag; `None` as in `_log_odds`."""
        after = fork.after(text)
        if after is None or fork.side(text) is None:
            return None
        character = len(text) - len(text[after:].lstrip())

        def written(position: int) -> int:
            return len(self._tokenizer.decode(tokens[: position + 1], skip_special_tokens=True))

        # The first token with which the text reaches beyond the character.
        return bisect_right(range(len(tokens)), character, key=written)

    def _split(self, before: Sequence[int], fork: Fork) -> dict[Label, NDArray[np.intp]]:
        """Return, by label, the indices in `self.tokens` of those that continue the tokens `before` to its answer."""
        written = fork.begun(self._tokenizer.decode(before, skip_special_tokens=True))
        key = fork.tag, written
        if key not in self._sides:
            sides = [fork.side(written + text) for text in self._texts.values()]
            self._sides[key] = {label: np.flatnonzero([side == label for side in sides]) for label in fork.openings}
        return self._sides[key]


def _probability(log_odds: float) -> float:
    from scipy.special import expit

    return float(expit(log_odds))


def mean_of_samples(letters: Sequence[float | None], samples: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Return the mean probability of `A` over the samples of each image, from those of greedy and sampled answers.

    An image whose greedy answer has none has no probability; samples without a clean letter do not count.
    """
    means = []
    for letter, *sampled in zip(letters, *samples, strict=True):
        clean = [value for value in sampled if value is not None]
        means.append(letter if letter is None or not clean else float(np.mean(clean)))
    return means


def _decides(text: str) -> bool:
    bare = _bare(text)
    if bare not in _BEGUN and not bare.startswith(_WHOLE):  # nearly every token: what follows is slow
        return False
    forks = (*BRANCHES, LETTER)
    # Before a deciding token comes nothing, a part of the tag, or all of it.
    return any(fork.side(fork.tag[:n] + text) is not None for fork in forks for n in range(len(fork.tag) + 1))


_WHOLE = tuple(
    fork.tag[at:] + opening
    for fork in (*BRANCHES, LETTER)
    for at in range(len(fork.tag) + 1)
    for opening in chain(*fork.openings.values())
)
_BEGUN = {text[:end] for text in _WHOLE for end in range(1, len(text))}
