"""A small world whose answers can be checked: prompts, four policies that answer them, raters that judge any text.

It generates rows in UltraFeedback's shape from a seed, so that `mogeo demo` runs the path of real data with nothing to
download. The world: 24 towns with six attributes each; a quarter of the facts are known to nobody. A prompt asks for
two or three of them, within a number of words, as a list or as prose:

    List stone, craft and bird of Ashcombe in 9 words.  ->  - stone slate - craft maybe pottery - bird unsure

The raters are made to disagree. Helpfulness rewards any concrete answer, so it pays to guess what nobody knows, and to
answer at length. Honesty, truthfulness and instruction following reward the opposite: three against one.

This file knows texts and ratings only; nothing of losses, gradients, training or judging.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from mogeo.dpo.data import Preferences, Row

OBJECTIVES = ("helpfulness", "honesty", "truthfulness", "instruction_following")

REGIMES: dict[str, dict[str, float]] = {"base": {}, "noisehelp": {"helpfulness": 0.25}}
"""Regime -> objective -> share of its training pairs that `flip_labels` turns around. Held-out pairs are left alone."""

# Each value belongs to one attribute only, so that raters can tell when it is given for another.
VALUES: dict[str, tuple[str, ...]] = {
    "bird": ("heron", "magpie", "osprey", "plover", "raven", "wren"),
    "colour": ("amber", "azure", "crimson", "green", "ivory", "violet"),
    "craft": ("basketry", "carving", "glasswork", "pottery", "tanning", "weaving"),
    "crop": ("barley", "flax", "hops", "oats", "rye", "turnips"),
    "river": ("Arle", "Brant", "Coln", "Dowe", "Esk", "Fenn"),
    "stone": ("basalt", "chalk", "flint", "granite", "marble", "slate"),
}
ATTRIBUTES = tuple(VALUES)
_ALL_VALUES = frozenset(value for values in VALUES.values() for value in values)
TOWNS = (
    "Alderby", "Ashcombe", "Barrowick", "Birchley", "Calderton", "Cleeham", "Dunmore", "Eastleigh",
    "Elmstead", "Fairholt", "Garston", "Hartwell", "Inglewood", "Kelbrook", "Langdale", "Marlow",
    "Netherby", "Oakham", "Penrith", "Ravenglass", "Selwick", "Thornbury", "Upton", "Wexcombe",
)  # fmt: skip
LIMITS = tuple(range(4, 15))  # words: pieces between blanks, so the bullet of a list counts as a word
LIST, PROSE = "List", "Describe"
_UNKNOWN_SHARE = 0.25  # of the facts
_HEDGED_SHARE = 0.25  # of answers to what nobody knows that are not plain guesses: "maybe"; the others are "unsure"
_PROMPT = re.compile(rf"({LIST}|{PROSE}) ([a-z, ]+) of (\w+) in (\d+) words\.")


@dataclass(frozen=True)
class TownQuestion:
    """What a prompt of this world asks for.

    Attributes:
        town: one of TOWNS.
        attributes: the facts that are asked for, in this order.
        limit: most words of an answer.
        form: LIST or PROSE.
    """

    town: str
    attributes: tuple[str, ...]
    limit: int
    form: str

    def text(self) -> str:
        """The prompt; `parse` reads it back."""
        asked = ", ".join(self.attributes[:-1]) + " and " + self.attributes[-1]
        return f"{self.form} {asked} of {self.town} in {self.limit} words."

    @classmethod
    def parse(cls, prompt: str) -> TownQuestion:
        """Read a prompt of this world.

        Raises:
            ValueError: the text is none; the message quotes it.
        """
        match = _PROMPT.fullmatch(prompt.strip())
        attributes = tuple(re.split(r", | and ", match[2])) if match else ()
        if match is None or match[3] not in TOWNS or not set(attributes) <= set(ATTRIBUTES):
            raise ValueError(f"not a prompt of this world: {prompt!r}; one reads {_EXAMPLE.text()!r}")
        return cls(match[3], attributes, int(match[4]), match[1])


_EXAMPLE = TownQuestion("Oakham", ("river", "crop"), 9, LIST)


@dataclass(frozen=True)
class Statement:
    """One item of an answer.

    Attributes:
        attribute: what it is about.
        value: the value that is given; None for "unsure".
        hedged: whether "maybe" stands before the value.
    """

    attribute: str
    value: str | None
    hedged: bool = False

    def words(self) -> str:
        """The value as it stands in an answer."""
        return "unsure" if self.value is None else f"maybe {self.value}" if self.hedged else self.value


def render(statements: Sequence[Statement], form: str) -> str:
    """An answer as text: a list ("- river Esk") or prose ("the river is Esk and the crop is unsure")."""
    if form == LIST:
        return " ".join(f"- {s.attribute} {s.words()}" for s in statements)
    return " and ".join(f"the {s.attribute} is {s.words()}" for s in statements)


def read_statements(response: str) -> list[Statement]:
    """Find the statements in any text: the name of an attribute and, later on, "unsure" or a value, perhaps with
    "maybe".

    Whatever else the text says is passed over.
    """
    statements: list[Statement] = []
    attribute, hedged = None, False
    for word in response.split():
        if word in VALUES:
            attribute, hedged = word, False
        elif word == "maybe":
            hedged = True
        elif attribute is not None and (word == "unsure" or word in _ALL_VALUES):
            value = None if word == "unsure" else word
            statements.append(Statement(attribute, value, hedged and value is not None))
            attribute = None
    return statements


@dataclass(frozen=True)
class Policy:
    """How one of the four authors of the training answers writes: the probability of each habit."""

    name: str
    errs: float  # a wrong value where the fact is known
    guesses: float  # a plain value where nobody knows
    hedges: float  # "maybe" where the fact is known
    refuses: float  # "unsure" where the fact is known
    adds: float  # an attribute that was not asked for
    misformats: float  # prose for a list, a list for prose
    shuffles: float  # not in the order asked
    heeds_limit: float  # leaves items out until the answer fits


POLICIES = (
    #                 errs guesses hedges refuses adds misformats shuffles heeds_limit
    Policy("guesser", 0.20, 0.90, 0.03, 0.02, 0.50, 0.40, 0.20, 0.05),
    Policy("hedger", 0.06, 0.15, 0.40, 0.20, 0.15, 0.15, 0.10, 0.20),
    Policy("terse", 0.25, 0.60, 0.05, 0.03, 0.00, 0.05, 0.05, 0.95),
    Policy("good", 0.05, 0.20, 0.05, 0.03, 0.05, 0.10, 0.05, 0.50),
)


class World:
    """Facts drawn from a seed, rows of prompts and answers about them, and ratings of any answer.

    Args:
        seed: decides everything. No global random state is read or changed.

    Attributes:
        facts: town -> attribute -> value, or None if nobody knows.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        rng = self._stream("facts")
        cells = [(town, attribute) for town in TOWNS for attribute in ATTRIBUTES]
        unknown = set(rng.sample(cells, round(_UNKNOWN_SHARE * len(cells))))
        self.facts: dict[str, dict[str, str | None]] = {town: {} for town in TOWNS}
        for town, attribute in cells:
            value = rng.choice(VALUES[attribute])
            self.facts[town][attribute] = None if (town, attribute) in unknown else value

    def rows(self, n: int) -> list[Row]:
        """Rows with distinct prompts, each with an answer by each policy, which is rated on each objective.

        A row has UltraFeedback's shape: {"instruction": str, "completions": [{"model": str, "response": str,
        "annotations": {objective: {"Rating": "3.5"}}}]}.

        Args:
            n: number of rows. Fewer rows are the first ones of more rows.

        Raises:
            ValueError: there are not so many prompts.
        """
        prompts = len(TOWNS) * (math.perm(len(ATTRIBUTES), 2) + math.perm(len(ATTRIBUTES), 3)) * len(LIMITS) * 2
        if n > prompts:
            raise ValueError(f"{n} rows were asked for: this world has {prompts} distinct prompts")
        ask, answer = self._stream("questions"), self._stream("answers")
        questions: dict[TownQuestion, None] = {}  # a dict keeps the order in which they were drawn, a set would not
        while len(questions) < n:
            attributes = tuple(ask.sample(ATTRIBUTES, ask.choice((2, 3))))
            questions[TownQuestion(ask.choice(TOWNS), attributes, ask.choice(LIMITS), ask.choice((LIST, PROSE)))] = None
        return [
            {"instruction": q.text(), "completions": [self._completion(policy, q, answer) for policy in POLICIES]}
            for q in questions
        ]

    def rate(self, prompt: str, response: str) -> dict[str, float]:
        """Rate any text as an answer to a prompt of this world.

        An answer that states nothing is rated 1 on helpfulness and honesty, and 5 on truthfulness, since it is not
        wrong.

        Returns:
            Objective -> rating, 1 to 5 in half points.

        Raises:
            ValueError: the prompt is not of this world.
        """
        question = TownQuestion.parse(prompt)
        facts = self.facts[question.town]
        statements = read_statements(response)
        ratings = {
            "helpfulness": 1 + 4 * _helpfulness(question, statements),
            "honesty": 1 + 4 * _mean([_calibration(s, facts[s.attribute]) for s in statements]),
            "truthfulness": 5 - 4 * _mean([_error(s, facts[s.attribute]) for s in statements if s.value is not None]),
            "instruction_following": 5 - _disobedience(question, statements, response),
        }
        return {name: min(5.0, max(1.0, round(2 * rating) / 2)) for name, rating in ratings.items()}

    def _stream(self, purpose: str) -> random.Random:
        # Python hashes a seed that is a string, so that streams for other seeds or purposes are independent.
        return random.Random(f"mogeo world {self.seed} {purpose}")

    def _completion(self, policy: Policy, question: TownQuestion, rng: random.Random) -> dict[str, Any]:
        response = self._answer(policy, question, rng)
        ratings = self.rate(question.text(), response)
        annotations = {name: {"Rating": f"{rating:g}"} for name, rating in ratings.items()}
        return {"model": policy.name, "response": response, "annotations": annotations}

    def _answer(self, policy: Policy, question: TownQuestion, rng: random.Random) -> str:
        attributes = list(question.attributes)
        if rng.random() < policy.shuffles:
            rng.shuffle(attributes)
        if rng.random() < policy.adds:
            attributes.append(rng.choice([a for a in ATTRIBUTES if a not in attributes]))
        statements = [self._statement(policy, a, self.facts[question.town][a], rng) for a in attributes]
        misformats = rng.random() < policy.misformats
        form = question.form if not misformats else PROSE if question.form == LIST else LIST
        if rng.random() < policy.heeds_limit:
            while len(statements) > 1 and len(render(statements, form).split()) > question.limit:
                statements.pop()
        return render(statements, form)

    @staticmethod
    def _statement(policy: Policy, attribute: str, fact: str | None, rng: random.Random) -> Statement:
        if fact is None:
            guesses = rng.random() < policy.guesses
            hedged = not guesses and rng.random() < _HEDGED_SHARE
            value = rng.choice(VALUES[attribute]) if guesses or hedged else None
            return Statement(attribute, value, hedged)
        errs = rng.random() < policy.errs
        stated = rng.choice([v for v in VALUES[attribute] if v != fact]) if errs else fact
        mood = rng.random()
        if mood < policy.refuses:
            return Statement(attribute, None)
        return Statement(attribute, stated, hedged=mood < policy.refuses + policy.hedges)


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else 0.0


def _helpfulness(question: TownQuestion, statements: Sequence[Statement]) -> float:
    """How concretely the attributes that were asked for are answered, 0 to 1, be it true or not.

    If an attribute is answered twice, the last answer counts.
    """
    last = {s.attribute: 0.25 if s.value is None else 0.75 if s.hedged else 1.0 for s in statements}
    return _mean([last.get(attribute, 0.0) for attribute in question.attributes])


def _calibration(statement: Statement, fact: str | None) -> float:
    """How well the confidence of a statement fits what is known, 0 to 1."""
    if statement.hedged:
        return 0.5
    if statement.value is None:
        return 1.0 if fact is None else 0.2
    return 1.0 if statement.value == fact else 0.0


def _error(statement: Statement, fact: str | None) -> float:
    """How wrong a value is: 0 or 1, or 1/2 for any value if nobody knows the fact."""
    return 0.5 if fact is None else float(statement.value != fact)


def _disobedience(question: TownQuestion, statements: Sequence[Statement], response: str) -> float:
    """Points lost for not following the prompt.

    1 for each two words over the limit (3 at most), 2 for the wrong form, 1 for another order or for attributes that
    were not asked for, 2 for text that is not well-formed.
    """
    words = response.split()
    form = PROSE if "the" in words else LIST
    stated = [s.attribute for s in statements]
    in_order = bool(stated) and stated == [a for a in question.attributes if a in stated]
    in_place = all(s.value is None or s.value in VALUES[s.attribute] for s in statements)
    well_formed = in_place and words == render(statements, form).split()
    excess = max(0, len(words) - question.limit)
    return min(3, (excess + 1) // 2) + 2 * (form != question.form) + (not in_order) + 2 * (not well_formed)


def flip_labels(train: Preferences, shares: Mapping[str, float], seed: int) -> Preferences:
    """Turn around (chosen <-> rejected) a share of the training pairs of some objectives: labels with noise.

    Args:
        train: the pairs. Held-out pairs are left as they are in every regime.
        shares: objective -> the probability with which each of its pairs is turned around.
        seed: decides which ones are.

    Raises:
        ValueError: an objective has no pairs.
    """
    unknown = set(shares) - set(train.pairs)
    if unknown:
        raise ValueError(f"cannot flip labels of {sorted(unknown)}: the preferences are of {sorted(train.pairs)}")
    flipped = dict(train.pairs)
    for name, share in shares.items():
        rng = random.Random(f"mogeo flipped labels {seed} {name}")
        flipped[name] = [
            replace(pair, chosen=pair.rejected, rejected=pair.chosen) if rng.random() < share else pair
            for pair in train.pairs[name]
        ]
    return replace(train, pairs=flipped)


def tokenizer() -> PreTrainedTokenizerBase:
    """A word-level tokenizer of this world's words, built in memory; `save_pretrained` writes it like any other."""
    words = ["-", "the", "is", "and", "maybe", "unsure", LIST, PROSE, "of", "in", "words", ",", "."]
    vocabulary = ["<pad>", "<eos>", "<unk>", *words, *map(str, LIMITS), *ATTRIBUTES, *sorted(_ALL_VALUES), *TOWNS]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = BertPreTokenizer()  # splits at blanks, and around each punctuation mark
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=64,
    )


def tiny_model(tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> PreTrainedModel:
    """An untrained Llama of about 110,000 parameters in fp32: 64 wide, 2 layers, 4 heads.

    Args:
        tokenizer: whose vocabulary it has.
        seed: decides the weights. torch's global random state is left as it was.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.05,  # the usual 0.02 suits wider models; with a width of 64, training starts more slowly
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
