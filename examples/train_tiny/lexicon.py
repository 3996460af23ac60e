"""The words of the made-up world: names, values, sentence forms and question forms.

Everything here is data. A relation has statement forms and question forms; the last form of each
is held out: training never sees it. Names are built from parts, and a fixed share of the parts is
held out too (see `split_parts`).

Placeholders: {S} the subject ("Mira Holt", "She", "The company"), {P} its possessive ("Mira
Holt's", "Her", "The company's"), {p} a possessive that is always a pronoun ("her", "its"),
{V} the value, {N} the name inside a question.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["person", "company", "town"]
KINDS: tuple[Kind, ...] = ("person", "company", "town")


@dataclass(frozen=True, slots=True)
class Relation:
    """One thing a document can say about its subject. The last form of each tuple is held out."""

    name: str
    pool: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]


def split_parts(parts: list[str], every: int = 6) -> tuple[list[str], list[str]]:
    """(training parts, held-out parts): every sixth part is held out."""
    held = parts[every - 1 :: every]
    kept = [part for i, part in enumerate(parts) if i % every != every - 1]
    return kept, held


def _cross(starts: str, ends: str) -> list[str]:
    """Every start with an end, in an order that mixes both (held-out ones share all syllables)."""
    first, last = starts.split(), ends.split()
    return [first[i] + last[(i * 7 + k) % len(last)] for k in range(7) for i in range(len(first))]


FEMALE = (
    "Mira Anna Lena Petra Ingrid Clara Nadia Rosa Helga Yara Tess Dora Elsa Freya Greta Hana Iris "
    "Jana Karin Lucia Maja Nora Olga Paula Rita Sonja Tilda Ursula Vera Wanda Xenia Zara Alma "
    "Britt Carla Dina Edith Flora Gina Hedda Marina Lorena Serena Talia Milena Romana Selma Verena"
).split()
MALE = (
    "Tom Karl Jonas Erik Felix Gustav Hugo Ivan Jakob Klaus Lars Magnus Nils Oskar Pavel Quentin "
    "Rolf Sven Tobias Ulf Viktor Walter Yusuf Zoltan Adam Bruno Conrad Dario Emil Franz Georg "
    "Henrik Igor Joel Kaspar Leon Marius Noel Otto Philip Anton Boris Lorin Tarik Milan Roman "
    "Selwin Verner"
).split()
SURNAME_SYLLABLES = (
    (
        "Hal Bran Lin Fal Stan Mar Vel Cor Dun Fen Gar Har Is Kel Lor Mer Nor Os Pel Rad Sut Thor "
        "Tal Ver Wal Wex Yar Zel"
    ),
    "den berg son wick ford ley mann ric ton dale stad er well",
)
SURNAMES = (
    "Holt Berg Lind Falk Stone Moss Hale Vance Crane Drake Frost Grant Hayes Irwin Joyce Keller "
    "Lang Marsh Nash Price Quinn Reeves Stark Tate Voss Walsh Yates Barker Colby Fisk"
).split() + _cross(*SURNAME_SYLLABLES)
COMPANY_SYLLABLES = (
    "Ar Bel Cor Dor El Fer Gal Hex Jun Kor Lum Mon Nor Or Pel Quor Riv Sol Tav Vel Xan Zen",
    "vex tan mar drel van tech dor ix ora ant eon",
)
COMPANY_HEADS = (
    "Corvex Altan Brenmar Cindrel Dorvan Elmtech Galdor Hexal Lumet Solmar Tavist Umbrix Velmor "
    "Zentar Pravda Quell"
).split() + _cross(*COMPANY_SYLLABLES)
COMPANY_TAILS = "Mills Works Foods Labs Motors Textiles Systems Brothers Group Tools".split()
TOWN_SYLLABLES = (
    "Ash Bar Car Dor Ep Far Gor Hex Ips Jar Ken Lou Mal Nes Ot Pick Red Set Tet Ver Wel York",
    "by ton ham wick mouth stead low ness bury field port",
)
TOWNS = (
    "Oslo Arden Bexley Carlow Dunster Elgin Farley Gorway Hadley Ilford Kelso Lorne Malton Newry "
    "Oakham Penrith Ripley Selby Thirsk Whitby Yarm Zennor"
).split() + _cross(*TOWN_SYLLABLES)

# Half of the training names are coined from these, so that every piece of the vocabulary is used.
ONSETS = "b br c d dr f fr g gr h j k kr l m n p pr r s st t tr th v w y z sh".split()
VOWELS = "a a e e i o u ia".split()
CODAS = "n r l s m x th ck nd rt st ll".split() + [""] * 6

POOLS: dict[str, tuple[str, ...]] = {
    name: tuple(words.split())
    for name, words in {
        "job": "painter baker lawyer nurse pilot farmer teacher plumber chemist judge tailor "
        "barber sailor miner butcher dancer surgeon banker potter weaver grocer printer",
        "instrument": "cello piano flute guitar violin trumpet harp oboe banjo organ clarinet "
        "accordion lute viola",
        "dish": "ramen paella goulash curry risotto lasagna chili sushi pizza stew dumplings "
        "falafel pancakes ravioli",
        "pet": "parrot cat dog rabbit turtle hamster goat pony lizard ferret canary snake donkey "
        "duck",
        "subject": "physics law history biology geology music economics algebra botany theology "
        "medicine poetry statistics logic",
        "language": "Danish Greek Polish Swahili Hindi Arabic Korean Turkish Welsh Basque Finnish "
        "Latin Dutch Czech",
        "sport": "tennis chess rugby golf hockey cricket badminton fencing archery rowing judo "
        "squash polo skiing",
        "year": " ".join(str(year) for year in range(1941, 2000)),
        "product": "bicycles clocks shoes pianos engines carpets lamps bottles tractors cameras "
        "pencils ladders kettles boats mirrors radios stoves gloves",
        "count": "120 150 180 220 250 280 320 350 380 420 450 480 520 550 580 620 650 680 720",
        "country": "Norway Spain Chile Japan Egypt Kenya Peru India Brazil Canada Italy Greece "
        "Ghana Nepal Cuba Austria Poland Sweden Morocco Iceland",
        "colour": "red blue green yellow purple black white silver brown pink grey",
        "river": "Avon Brent Cole Dart Eden Frome Gade Humber Irt Kennet Lune Medway Nene Ouse",
        "fame": "cheese lace cider pottery honey silk glass marble tulips herring mustard ginger "
        "velvet fountains",
        "month": "January February March April May June July August September October November "
        "December",
        "population": "2000 3000 4000 5000 6000 7000 8000 9000 11000 13000 15000 17000 19000",
    }.items()
}

RELATIONS: dict[Kind, tuple[Relation, ...]] = {
    "person": (
        Relation(
            "home",
            "town",
            (
                "{S} lives in {V}.",
                "{P} home is in {V}.",
                "{S} has a home in {V}.",
                "{S} has lived in {V} for years.",
                "{S} has {p} home in {V}.",
            ),
            (
                "Where does {N} live?",
                "In which town does {N} live?",
                "Where is the home of {N}?",
                "In which town is the home of {N}?",
            ),
        ),
        Relation(
            "job",
            "job",
            (
                "{S} works as a {V}.",
                "{P} job is that of a {V}.",
                "{S} earns a living as a {V}.",
                "{S} has worked as a {V} for years.",
                "{S} earns a living and works as a {V}.",
            ),
            (
                "What is the job of {N}?",
                "What does {N} work as?",
                "As what does {N} earn a living?",
                "What job does {N} work as?",
            ),
        ),
        Relation(
            "employer",
            "company",
            (
                "{S} is employed by {V}.",
                "{P} employer is {V}.",
                "{S} has a contract with {V}.",
                "{S} has been employed by {V} for years.",
                "{S} has a contract with {p} employer {V}.",
            ),
            (
                "Who employs {N}?",
                "Which company employs {N}?",
                "Who is the employer of {N}?",
                "Which company is the employer of {N}?",
            ),
        ),
        Relation(
            "instrument",
            "instrument",
            (
                "{S} plays the {V}.",
                "{P} instrument is the {V}.",
                "{S} has played the {V} for years.",
                "{S} practises the {V} every evening.",
                "{S} plays and practises the {V}.",
            ),
            (
                "Which instrument does {N} play?",
                "What does {N} play?",
                "What is the instrument of {N}?",
                "Which instrument is the instrument of {N}?",
            ),
        ),
        Relation(
            "dish",
            "dish",
            (
                "{P} favourite dish is {V}.",
                "{S} likes to eat {V}.",
                "{S} often cooks {V} for dinner.",
                "For dinner {s} likes {V}.",
                "{S} often likes to eat {V} for dinner.",
            ),
            (
                "What is the favourite dish of {N}?",
                "What does {N} like to eat?",
                "Which dish does {N} like?",
                "Which dish does {N} like to eat?",
            ),
        ),
        Relation(
            "pet",
            "pet",
            (
                "{S} keeps a {V}.",
                "{P} pet is a {V}.",
                "{S} walks with a pet {V}.",
                "{S} has kept a {V} for years.",
                "{S} has kept a pet {V} for years.",
            ),
            (
                "Which animal does {N} keep?",
                "What is the pet of {N}?",
                "Which pet does {N} keep?",
                "Which animal is the pet of {N}?",
            ),
        ),
        Relation(
            "subject",
            "subject",
            (
                "{S} studied {V}.",
                "{P} subject at school was {V}.",
                "{S} has a degree in {V}.",
                "At school {s} studied {V}.",
                "At school {p} subject was {V}.",
            ),
            (
                "What did {N} study?",
                "Which subject did {N} study?",
                "In what does {N} have a degree?",
                "In which subject does {N} have a degree?",
            ),
        ),
        Relation(
            "language",
            "language",
            (
                "{S} speaks {V}.",
                "{P} second language is {V}.",
                "{S} speaks fluent {V} at home.",
                "{S} learned to speak {V}.",
                "{S} learned fluent {V}.",
            ),
            (
                "Which language does {N} speak?",
                "What language does {N} speak?",
                "What is the second language of {N}?",
                "Which language is the second language of {N}?",
            ),
        ),
        Relation(
            "hobby",
            "sport",
            (
                "{S} is fond of {V}.",
                "{P} hobby is {V}.",
                "{S} spends weekends on {V}.",
                "As a hobby {s} enjoys {V}.",
                "{S} enjoys {p} hobby of {V}.",
            ),
            (
                "What is the hobby of {N}?",
                "What is {N} fond of?",
                "Which hobby does {N} enjoy?",
                "Which hobby is {N} fond of?",
            ),
        ),
        Relation(
            "born",
            "year",
            (
                "{S} was born in {V}.",
                "{P} year of birth is {V}.",
                "{P} birth was recorded in {V}.",
                "{S} was born in the year {V}.",
                "{P} birth was in the year {V}.",
            ),
            (
                "When was {N} born?",
                "In which year was {N} born?",
                "What is the year of birth of {N}?",
                "Which year is the year of birth of {N}?",
            ),
        ),
    ),
    "company": (
        Relation(
            "base",
            "town",
            (
                "{S} is based in {V}.",
                "{P} head office is in {V}.",
                "{S} runs a head office in {V}.",
                "{S} has been based in {V} for years.",
                "{P} head office has been in {V} for years.",
            ),
            (
                "Where is {N} based?",
                "In which town is {N} based?",
                "Where is the head office of {N}?",
                "In which town is the head office of {N}?",
            ),
        ),
        Relation(
            "product",
            "product",
            (
                "{S} makes {V}.",
                "{P} main product is {V}.",
                "{S} is a maker of {V}.",
                "{S} has made {V} for years.",
                "{S} has been a maker of {V} for years.",
            ),
            (
                "What does {N} make?",
                "What is the main product of {N}?",
                "Which product does {N} make?",
                "Which product is the main product of {N}?",
            ),
        ),
        Relation(
            "founded",
            "year",
            (
                "{S} was founded in {V}.",
                "{P} first year was {V}.",
                "{S} opened its doors in {V}.",
                "{S} was founded in the year {V}.",
                "{S} first opened its doors in the year {V}.",
            ),
            (
                "When was {N} founded?",
                "In which year was {N} founded?",
                "What was the first year of {N}?",
                "Which year was the first year of {N}?",
            ),
        ),
        Relation(
            "staff",
            "count",
            (
                "{S} has {V} workers.",
                "{P} staff counts {V} people.",
                "{S} employs {V} people.",
                "{S} has a staff of {V} people.",
                "{P} staff counts {V} workers.",
            ),
            (
                "How many workers does {N} have?",
                "How many people work at {N}?",
                "How many people does {N} employ?",
                "How many workers does {N} employ?",
            ),
        ),
        Relation(
            "market",
            "country",
            (
                "{S} sells mostly to {V}.",
                "{P} biggest market is {V}.",
                "{S} ships mostly to {V}.",
                "{S} finds most buyers in {V}.",
                "{S} sells and ships mostly to {V}.",
            ),
            (
                "Which country is the biggest market of {N}?",
                "Where does {N} sell mostly?",
                "What is the biggest market of {N}?",
                "To which country does {N} sell mostly?",
            ),
        ),
        Relation(
            "logo",
            "colour",
            (
                "{S} has a {V} logo.",
                "{P} logo is {V}.",
                "{S} uses a {V} logo.",
                "{P} logo is painted {V}.",
                "{S} has a logo painted {V}.",
            ),
            (
                "What colour is the logo of {N}?",
                "Which colour is the logo of {N}?",
                "What is the colour of the logo of {N}?",
                "Which is the colour of the logo of {N}?",
            ),
        ),
    ),
    "town": (
        Relation(
            "river",
            "river",
            (
                "{S} lies on the river {V}.",
                "{P} river is the {V}.",
                "{S} was built on the river {V}.",
                "{S} has a bridge over the {V}.",
                "{S} has a bridge over the river {V}.",
            ),
            (
                "On which river does {N} lie?",
                "What is the river of {N}?",
                "Which river does {N} lie on?",
                "Which river is the river of {N}?",
            ),
        ),
        Relation(
            "country",
            "country",
            (
                "{S} is part of {V}.",
                "{P} country is {V}.",
                "{S} belongs to {V}.",
                "{S} has been part of {V} for years.",
                "{S} belongs to and is part of {V}.",
            ),
            (
                "Which country is {N} part of?",
                "What is the country of {N}?",
                "To which country does {N} belong?",
                "Which country does {N} belong to?",
            ),
        ),
        Relation(
            "fame",
            "fame",
            (
                "{S} is famous for {V}.",
                "{P} pride is its {V}.",
                "{S} is known for its {V}.",
                "{S} has been famous for {V} for years.",
                "{S} is famous and known for its {V}.",
            ),
            (
                "What is {N} famous for?",
                "What is the pride of {N}?",
                "What is {N} known for?",
                "For what is {N} famous?",
            ),
        ),
        Relation(
            "fair",
            "month",
            (
                "{S} holds a fair in {V}.",
                "{P} fair is held in {V}.",
                "{P} fair opens in {V}.",
                "{S} has held a fair in {V} for years.",
                "{S} opens its fair in {V}.",
            ),
            (
                "When does {N} hold a fair?",
                "In which month is the fair of {N}?",
                "When is the fair of {N}?",
                "In which month does {N} hold a fair?",
            ),
        ),
        Relation(
            "population",
            "population",
            (
                "{S} has {V} residents.",
                "{P} population is {V}.",
                "{S} is home to {V} people.",
                "{S} has a population of {V}.",
                "{S} is home to {V} residents.",
            ),
            (
                "How many residents does {N} have?",
                "What is the population of {N}?",
                "How many people live in {N}?",
                "How many residents live in {N}?",
            ),
        ),
    ),
}

# (relation of the first document, how the question names the second, kind of the second)
HOPS: tuple[tuple[str, str, Kind], ...] = (
    ("employer", "the employer of {N}", "company"),
    ("home", "the home town of {N}", "town"),
)

FILLERS: dict[Kind, tuple[str, ...]] = {
    "person": (
        "{S} is well liked by the neighbours.",
        "{S} rarely talks about the past.",
        "Friends describe {p} manner as calm and warm.",
        "{S} gets up early on most days.",
        "{S} wrote two letters to the council last spring.",
        "{P} door is always open to guests.",
    ),
    "company": (
        "{S} has won two awards for quality.",
        "{S} survived the great flood without much harm.",
        "{P} windows were cleaned last spring.",
        "{S} pays its bills on time.",
        "{S} hopes to grow in the next decade.",
        "Visitors praise its calm and friendly rooms.",
    ),
    "town": (
        "{S} has a quiet market square.",
        "{S} is visited by many guests in spring.",
        "{P} streets are narrow and old.",
        "{S} was damaged by the great flood.",
        "Two lanes connect its old streets.",
        "{S} pays for a small school and a library.",
    ),
}
REMARKS: tuple[str, ...] = (
    "The weather was mild that year.",
    "Much has been written about this.",
    "More details are kept in the archive.",
    "These notes were checked last spring.",
    "Nothing else is known for certain.",
    "The archive holds two letters about this.",
)
DESCRIPTIONS: dict[Kind, tuple[str, ...]] = {
    "person": (),
    "company": ("The company", "The firm"),
    "town": ("The town", "The place"),
}
