"""Documents and questions about made-up people, companies and towns.

A document is about one entity and is cut into chunks. The first chunk names the entity; a later
chunk either names it again or speaks of it by pronoun only. Every fact is one of three kinds:

- direct: the fact's own sentence names the subject;
- local: the sentence says "she" or "the company", and the name stands earlier in the same chunk;
- split: the chunk never names the subject; only the chunk before it does.

A `hop` question needs two facts: the employer of X, and where that employer is based.
"""

import random
from dataclasses import dataclass, field
from typing import Literal

from . import lexicon, phrasings
from .lexicon import Kind, Relation

Binding = Literal["direct", "local", "split", "hop", "hopsplit"]
BINDINGS: tuple[Binding, ...] = ("direct", "local", "split", "hop", "hopsplit")
Split = Literal["train", "held_out"]
Spot = tuple[int, int]  # (chunk, character) inside a prompt or a document


@dataclass(frozen=True, slots=True)
class Shape:
    """How big and how hard one prompt is."""

    documents: tuple[int, int] = (8, 8)
    chunks: tuple[int, int] = (1, 3)  # per document
    facts: tuple[int, int] = (2, 4)  # per chunk
    named: float = 0.2  # share of later sentences that say the name again
    split: float = 0.75  # share of later chunks that never name their subject
    filler: float = 0.25  # expected filler sentences per fact: about this / (1 - this)
    one_kind: float = 0.3  # share of prompts whose documents are all of one kind
    same_relations: float = 0.9  # share of prompts whose documents state the same relations
    link: float = 0.5  # share of town and company values that name another document
    hop: float = 0.2  # share of questions that need two facts
    alike: float = 0.0  # share of prompts most of whose names end alike


@dataclass(frozen=True, slots=True)
class Fact:
    relation: Relation
    value: str
    binding: Binding
    spot: Spot  # first character of the value
    mention: Spot  # last character of the subject's latest mention


@dataclass(slots=True)
class Document:
    kind: Kind
    name: str
    female: bool = False
    chunks: list[str] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)
    novel: bool = False  # holds a held-out name part or statement form
    first_chunk: int = 0  # place of its first chunk in the prompt


@dataclass(frozen=True, slots=True)
class Question:
    text: str
    answer: str
    binding: Binding
    name_end: int  # last character of the name in the text
    first: Spot  # first character of the value that the name leads to
    last: Spot  # first character of the answer (the same, but for hops)


@dataclass(frozen=True, slots=True)
class Prompt:
    documents: list[Document]
    questions: list[Question]

    @property
    def chunks(self) -> list[str]:
        return [chunk for document in self.documents for chunk in document.chunks]


class NameParts:
    """The listed parts of one kind of name, and the syllables that further ones are made of."""

    def __init__(self, listed: list[str], syllables: tuple[str, str] = ("", "")) -> None:
        self.kept, self.held = lexicon.split_parts(list(dict.fromkeys(listed)))
        self.starts, self.ends = syllables[0].split(), syllables[1].split()


class Names:
    """Draws names. Held-out draws take each part from the held-out list half of the time.

    Training draws build two thirds of the parts anew (of first names a third), from the syllables
    of surnames, companies and towns or from random ones, so that names are something to be read,
    not to be known; never a held-out part.
    """

    def __init__(self, split: Split) -> None:
        self.held = split == "held_out"
        self.female = NameParts(lexicon.FEMALE)
        self.male = NameParts(lexicon.MALE)
        self.surnames = NameParts(lexicon.SURNAMES, lexicon.SURNAME_SYLLABLES)
        self.heads = NameParts(lexicon.COMPANY_HEADS, lexicon.COMPANY_SYLLABLES)
        self.towns = NameParts(lexicon.TOWNS, lexicon.TOWN_SYLLABLES)
        every = (self.female, self.male, self.surnames, self.heads, self.towns)
        self.reserved = {part for parts in every for part in parts.held}

    @staticmethod
    def coin(rng: random.Random) -> str:
        """A made-up word of two syllables, at times of three."""
        return "".join(
            rng.choice(lexicon.ONSETS) + rng.choice(lexicon.VOWELS) + rng.choice(lexicon.CODAS)
            for _ in range(rng.choice((2, 2, 2, 2, 3)))
        ).capitalize()

    def part(self, rng: random.Random, parts: "NameParts") -> tuple[str, bool]:
        """One part, and whether it is a held-out one. Half of the listed ones are of the first 24.

        A held-out world lists all its names; a training world builds many of them.
        """
        if self.held and rng.random() < 0.5:
            return rng.choice(parts.held), True
        if not self.held and rng.random() < (2 / 3 if parts.starts else 1 / 3):
            return self.build(rng, parts), False
        kept = parts.kept
        return (
            kept[rng.randrange(min(24, len(kept)))] if rng.random() < 0.5 else rng.choice(kept)
        ), False

    def build(self, rng: random.Random, parts: "NameParts") -> str:
        """A part that no list holds out."""
        while True:
            if parts.starts and rng.random() < 0.7:
                name = rng.choice(parts.starts) + rng.choice(parts.ends)
            else:
                name = self.coin(rng)
            if name not in self.reserved:
                return name

    def ending(self, rng: random.Random, kind: Kind) -> str:
        """What names of one kind can have in common."""
        if kind == "company":
            return rng.choice(lexicon.COMPANY_TAILS)
        return rng.choice((self.surnames if kind == "person" else self.towns).ends)

    def similar(self, rng: random.Random, kind: Kind, female: bool, ending: str) -> str:
        """A name with that ending, in which no list's held-out part stands."""
        if kind == "company":
            return f"{self.part(rng, self.heads)[0]} {ending}"
        parts = self.surnames if kind == "person" else self.towns
        part = rng.choice(parts.starts) + ending
        while part in self.reserved:
            part = rng.choice(parts.starts) + ending
        if kind == "town":
            return part
        return f"{self.part(rng, self.female if female else self.male)[0]} {part}"

    def draw(self, rng: random.Random, kind: Kind, female: bool) -> tuple[str, bool]:
        if kind == "person":
            first, new_first = self.part(rng, self.female if female else self.male)
            last, new_last = self.part(rng, self.surnames)
            return f"{first} {last}", new_first or new_last
        if kind == "town":
            return self.part(rng, self.towns)
        head, new = self.part(rng, self.heads)
        return f"{head} {rng.choice(lexicon.COMPANY_TAILS)}", new


class World:
    """Writes prompts. `split` decides which names and sentence forms may appear."""

    def __init__(self, split: Split) -> None:
        self.held = split == "held_out"
        self.names = Names(split)

    def statement(self, rng: random.Random, relation: Relation) -> tuple[str, bool]:
        """A form, and whether it is held out; a held-out world takes that one every third time.

        A training world also has `phrasings`, and puts words around every fifth statement.
        """
        if self.held:
            return self.held_out(rng, relation.statements)
        form = rng.choice(relation.statements[:-1] + phrasings.MORE[relation.name][0])
        if form.startswith(("{S}", "{P}")) and rng.random() < 0.12:
            form = rng.choice(phrasings.OPENINGS) + form[:3].lower() + form[3:]
        if rng.random() < 0.08:
            form = form[:-1] + rng.choice(phrasings.ENDINGS)
        return form, False

    def asking(self, rng: random.Random, relation: Relation) -> str:
        """A question form; a held-out world takes the held-out one every third time."""
        if self.held:
            return self.held_out(rng, relation.questions)[0]
        form = rng.choice(relation.questions[:-1] + phrasings.MORE[relation.name][1])
        if rng.random() < 0.1:
            form = rng.choice(phrasings.LEADS) + form[0].lower() + form[1:]
        return form

    def held_out(self, rng: random.Random, forms: tuple[str, ...]) -> tuple[str, bool]:
        if rng.random() < 1 / 3:
            return forms[-1], True
        return forms[rng.randrange(len(forms) - 1)], False

    def prompt(self, rng: random.Random, shape: Shape, questions: int) -> Prompt:
        """One prompt with up to `questions` questions, in random order."""
        documents = self.cast(rng, shape)
        self.write(rng, shape, documents)
        chunk = 0
        for document in documents:
            document.first_chunk = chunk
            chunk += len(document.chunks)
        return Prompt(documents, self.ask(rng, documents, questions, shape.hop))

    def cast(self, rng: random.Random, shape: Shape) -> list[Document]:
        """Who the documents are about: distinct name parts, shuffled.

        In a held-out world every one has a held-out part, so no document is a training document.
        """
        count = rng.randint(*shape.documents)
        if count == 1 or rng.random() < shape.one_kind:
            kinds: list[Kind] = [rng.choice(("person", "person", "company", "town"))] * count
        else:
            kinds = [rng.choices(lexicon.KINDS, (0.46, 0.30, 0.24))[0] for _ in range(count)]
        taken: set[str] = set()
        documents = []
        endings: dict[Kind, str] = {}
        if shape.alike and rng.random() < shape.alike:
            endings = {kind: self.names.ending(rng, kind) for kind in lexicon.KINDS}
        for kind in kinds:
            female = rng.random() < 0.5
            name, new = self.names.draw(rng, kind, female)
            if endings and rng.random() < 0.6:
                name, new = self.names.similar(rng, kind, female, endings[kind]), False
            while (self.held and not new) or any(
                part in taken for part in name.split()[: 2 if kind == "person" else 1]
            ):
                name, new = self.names.draw(rng, kind, female)
            taken.update(name.split()[: 2 if kind == "person" else 1])
            documents.append(Document(kind, name, female, novel=new))
        rng.shuffle(documents)
        return documents

    def write(self, rng: random.Random, shape: Shape, documents: list[Document]) -> None:
        """Fill in the text of every document of a prompt."""
        named = {kind: [d.name for d in documents if d.kind == kind] for kind in lexicon.KINDS}
        orders = {
            kind: rng.sample(relations, len(relations))
            for kind, relations in lexicon.RELATIONS.items()
        }
        same = rng.random() < shape.same_relations
        used: dict[str, set[str]] = {}
        for document in documents:
            order = orders[document.kind]
            relations = list(order) if same else rng.sample(order, len(order))
            sizes = [rng.randint(*shape.facts) for _ in range(rng.randint(*shape.chunks))]
            relations = relations[: sum(sizes)]
            rng.shuffle(relations)
            writer = Writer(self, rng, shape, document)
            for size in sizes:
                part, relations = relations[:size], relations[size:]
                if len(part) >= min(2, size):
                    values = [
                        self.value(rng, shape, relation, document, named, used) for relation in part
                    ]
                    writer.chunk(list(zip(part, values, strict=True)))

    def value(
        self,
        rng: random.Random,
        shape: Shape,
        relation: Relation,
        document: Document,
        named: dict[Kind, list[str]],
        used: dict[str, set[str]],
    ) -> str:
        """A value that no other document of the prompt has for this relation, if one is left."""
        kind: Kind | None = {"town": "town", "company": "company"}.get(relation.pool)  # type: ignore[assignment]
        if kind and named[kind] and rng.random() < shape.link:
            return rng.choice(named[kind])
        seen = used.setdefault(relation.name, set())
        for _ in range(20):
            if kind:
                value = self.names.draw(rng, kind, False)[0]
            else:
                value = rng.choice(lexicon.POOLS[relation.pool])
            if value not in seen:
                break
        seen.add(value)
        return value

    def ask(
        self, rng: random.Random, documents: list[Document], count: int, hop: float
    ) -> list[Question]:
        """Up to `count` questions; kinds are drawn by weight, facts without replacement."""
        by_name = {document.name: document for document in documents}
        pool: dict[Binding, list[tuple[Document, Fact, str, Document, Fact]]] = {
            binding: [] for binding in BINDINGS
        }
        for document in documents:
            for fact in document.facts:
                pool[fact.binding].append((document, fact, "{N}", document, fact))
                for relation, phrase, kind in lexicon.HOPS:
                    other = by_name.get(fact.value)
                    if fact.relation.name != relation or other is None or other.kind != kind:
                        continue
                    for second in other.facts:
                        split = "split" in (fact.binding, second.binding)
                        pool["hopsplit" if split else "hop"].append(
                            (document, fact, phrase, other, second)
                        )
        one = 1 - hop
        weights = dict(
            zip(BINDINGS, (0.25 * one, 0.275 * one, 0.475 * one, 0.7 * hop, 0.3 * hop), strict=True)
        )
        for candidates in pool.values():
            rng.shuffle(candidates)
        questions: list[Question] = []
        while len(questions) < count:
            left = [binding for binding in BINDINGS if pool[binding]]
            if not left:
                break
            binding = rng.choices(left, [weights[b] for b in left])[0]
            questions.append(self.question(rng, binding, *pool[binding].pop()))
        return questions

    def question(
        self,
        rng: random.Random,
        binding: Binding,
        document: Document,
        fact: Fact,
        phrase: str,
        other: Document,
        second: Fact,
    ) -> Question:
        form = self.asking(rng, second.relation)
        form = form.replace("{N}", phrase)
        name_end = form.index("{N}") + len(document.name) - 1
        return Question(
            form.replace("{N}", document.name),
            second.value,
            binding,
            name_end,
            (document.first_chunk + fact.spot[0], fact.spot[1]),
            (other.first_chunk + second.spot[0], second.spot[1]),
        )


class Writer:
    """Writes the chunks of one document, one after another."""

    def __init__(self, world: World, rng: random.Random, shape: Shape, document: Document) -> None:
        self.world, self.rng, self.shape, self.document = world, rng, shape, document
        self.fillers = list(lexicon.FILLERS[document.kind])
        self.remarks = list(lexicon.REMARKS)
        rng.shuffle(self.fillers)
        rng.shuffle(self.remarks)
        descriptions = lexicon.DESCRIPTIONS[document.kind]
        self.description = rng.choice(descriptions) if descriptions else ""
        self.mention: Spot = (0, 0)
        self.last_split = False
        self.text = ""
        self.named_here = False

    def chunk(self, facts: list[tuple[Relation, str]]) -> None:
        """Append one chunk that states `facts`. A split chunk always follows one with the name."""
        document, rng, shape = self.document, self.rng, self.shape
        split = bool(document.chunks) and not self.last_split and rng.random() < shape.split
        self.last_split, self.text, self.named_here = split, "", False
        room = 3  # filler sentences per chunk, at most
        for relation, value in facts:
            while room and rng.random() < shape.filler:
                self.filler(split)
                room -= 1
            named = not split and (not self.named_here or rng.random() < shape.named)
            form, new = self.world.statement(rng, relation)
            document.novel |= new
            before, after = self.fill(form, named).split("{V}")
            self.text += " " if self.text else ""
            self.mark(before, named)
            spot = (len(document.chunks), len(self.text) + len(before))
            self.text += before + value + after
            binding: Binding = "direct" if named else "local" if self.named_here else "split"
            self.named_here |= named
            document.facts.append(Fact(relation, value, binding, spot, self.mention))
        document.chunks.append(self.text)

    def filler(self, split: bool) -> None:
        if self.remarks and self.rng.random() < 0.3:
            sentence, named = self.remarks.pop(), False
        elif self.fillers:
            sentence = self.fillers.pop()
            named = not split and not self.named_here and ("{S}" in sentence or "{P}" in sentence)
            sentence = self.fill(sentence, named)
        else:
            return
        self.text += " " if self.text else ""
        self.mark(sentence, named)
        self.named_here |= named
        self.text += sentence

    def mark(self, sentence: str, named: bool) -> None:
        """Remember where `sentence`, about to be appended, mentions the name."""
        if named:
            at = sentence.index(self.document.name) + len(self.document.name) - 1
            self.mention = (len(self.document.chunks), len(self.text) + at)

    def fill(self, form: str, named: bool) -> str:
        """Put the name or a pronoun into a form; {V} stays."""
        document = self.document
        person = document.kind == "person"
        own = ("her" if document.female else "his") if person else "its"
        if named:
            subject, possessive = document.name, document.name + "'s"
            lower = subject
        elif person:
            subject, possessive = ("She", "Her") if document.female else ("He", "His")
            lower = subject.lower()
        elif self.rng.random() < 0.35:
            subject, possessive, lower = "It", "Its", "it"
        else:
            subject, possessive = self.description, self.description + "'s"
            lower = "t" + subject[1:]
        if "{p}" in form and "{S}" not in form and "{s}" not in form and named:
            own = possessive
        form = form.replace("{S}", subject).replace("{P}", possessive)
        return form.replace("{s}", lower).replace("{p}", own)
