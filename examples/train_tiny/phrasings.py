"""Further wordings that only training uses; none of them is a held-out form.

By relation: statement forms and question forms, with the placeholders of `lexicon.py`. Openings and
endings go around any statement, leads go before any question.
"""

MORE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "home": (
        (
            "{S} has {p} own house in {V}.",
            "{S} moved to {V} long ago.",
            "Ever since school {s} has lived in {V}.",
            "{P} house stands in {V}.",
        ),
        ("What is the home town of {N}?", "In which place does {N} live?", "Where is {N} at home?"),
    ),
    "job": (
        (
            "{S} is a {V} by trade.",
            "{P} work is that of a {V}.",
            "{S} makes a living as a {V}.",
            "{S} trained and now works as a {V}.",
        ),
        (
            "By trade, what is {N}?",
            "Which job does {N} have?",
            "What work does {N} do?",
        ),
    ),
    "employer": (
        (
            "{S} works for {V}.",
            "{S} has a post at {V}.",
            "{S} is on the staff of {V}.",
            "{S} signed a contract with {V}.",
        ),
        (
            "For whom does {N} work?",
            "At which company is {N} employed?",
            "Which employer does {N} have?",
        ),
    ),
    "instrument": (
        (
            "{S} performs on the {V}.",
            "{S} owns and plays a fine {V}.",
            "Every evening {s} plays the {V}.",
            "{S} took lessons on the {V}.",
        ),
        (
            "On which instrument does {N} perform?",
            "Which instrument does {N} practise?",
            "What instrument is played by {N}?",
        ),
    ),
    "dish": (
        (
            "{S} likes {V} best of all.",
            "{S} cooks and eats {V} whenever possible.",
            "{P} preferred dinner is {V}.",
            "{S} would like {V} for dinner every day.",
        ),
        (
            "What does {N} cook for dinner?",
            "Which dish is preferred by {N}?",
            "What food does {N} like best?",
        ),
    ),
    "pet": (
        (
            "{S} owns a {V}.",
            "{S} looks after a pet {V}.",
            "{S} shares {p} home with a {V}.",
            "For years {s} has kept a {V}.",
        ),
        (
            "What animal does {N} own?",
            "Which pet does {N} look after?",
            "What kind of pet does {N} have?",
        ),
    ),
    "subject": (
        (
            "{S} took a degree in {V}.",
            "{P} degree is in {V}.",
            "{S} went to school for {V}.",
            "{S} chose {V} as a subject.",
        ),
        (
            "What was the subject of {N} at school?",
            "In what did {N} take a degree?",
            "Which degree does {N} have?",
        ),
    ),
    "language": (
        (
            "{S} is fluent in {V}.",
            "{S} reads and speaks {V}.",
            "At home {s} speaks {V}.",
            "{S} took lessons in {V}.",
        ),
        (
            "In which language is {N} fluent?",
            "What does {N} speak at home?",
            "Which second language does {N} have?",
        ),
    ),
    "hobby": (
        (
            "{S} likes to spend {p} time on {V}.",
            "{S} has taken up {V} as a hobby.",
            "{P} weekends are spent on {V}.",
            "{S} is keen on {V}.",
        ),
        (
            "What does {N} enjoy as a hobby?",
            "On what does {N} spend weekends?",
            "Which hobby does {N} have?",
        ),
    ),
    "born": (
        (
            "{S} came into the world in {V}.",
            "{P} birthday fell in the year {V}.",
            "{P} year of birth was {V}.",
            "{S} was a child of {V}.",
        ),
        (
            "What year was {N} born in?",
            "When was the birth of {N}?",
            "In what year did {N} come into the world?",
        ),
    ),
    "base": (
        (
            "{S} has its head office in {V}.",
            "{S} works from an office in {V}.",
            "For years {s} has been based in {V}.",
            "{P} office stands in {V}.",
        ),
        (
            "From which town does {N} work?",
            "What is the home town of {N}?",
            "Where does {N} have its head office?",
        ),
    ),
    "product": (
        (
            "{S} builds and sells {V}.",
            "{S} produces {V}.",
            "{P} workshop makes {V}.",
            "{S} is the maker of fine {V}.",
        ),
        (
            "What does {N} produce?",
            "What is made by {N}?",
            "Of what is {N} a maker?",
        ),
    ),
    "founded": (
        (
            "{S} was set up in {V}.",
            "{S} began its work in {V}.",
            "{P} doors opened first in {V}.",
            "{S} has existed since {V}.",
        ),
        (
            "What year was {N} founded in?",
            "When did {N} open its doors?",
            "Since which year has {N} existed?",
        ),
    ),
    "staff": (
        (
            "{S} gives work to {V} people.",
            "{P} workers number {V} in all.",
            "{S} has {V} people on its staff.",
            "{P} team counts {V} workers.",
        ),
        (
            "How big is the staff of {N}?",
            "How many workers are employed at {N}?",
            "What number of people does {N} employ?",
        ),
    ),
    "market": (
        (
            "{S} has its biggest market in {V}.",
            "{P} buyers are mostly in {V}.",
            "{S} sends most of its goods to {V}.",
            "{S} trades mostly with {V}.",
        ),
        (
            "Where does {N} find most buyers?",
            "Which market is the biggest for {N}?",
            "Which country does {N} ship to mostly?",
        ),
    ),
    "logo": (
        (
            "{S} chose a {V} logo.",
            "{P} sign carries a {V} logo.",
            "{S} had its logo painted {V}.",
            "{P} colour is {V}.",
        ),
        (
            "In what colour is the logo of {N} painted?",
            "What colour does the logo of {N} have?",
            "Which colour does {N} use?",
        ),
    ),
    "river": (
        (
            "{S} stands by the river {V}.",
            "{P} old bridge crosses the {V}.",
            "{S} takes its water from the river {V}.",
            "{P} mills stand on the {V}.",
        ),
        (
            "By which river does {N} stand?",
            "Over which river does {N} have a bridge?",
            "What river is {N} on?",
        ),
    ),
    "country": (
        (
            "{S} is a town in {V}.",
            "{S} can be found in {V}.",
            "For years {s} has belonged to {V}.",
            "{S} lies in the south of {V}.",
        ),
        (
            "In which country does {N} lie?",
            "What country is {N} in?",
            "Of which country is {N} part?",
        ),
    ),
    "fame": (
        (
            "{S} is proud of its {V}.",
            "{P} best known product is {V}.",
            "{S} became famous through its {V}.",
            "{P} fame rests on {V}.",
        ),
        (
            "What made {N} famous?",
            "Of what is {N} proud?",
            "What is the fame of {N}?",
        ),
    ),
    "fair": (
        (
            "{S} has its fair in {V}.",
            "{P} yearly fair falls in {V}.",
            "{P} great fair comes in {V}.",
            "{S} invites guests to a fair in {V}.",
        ),
        (
            "When does the fair of {N} open?",
            "What month is the fair of {N} in?",
            "In which month does the fair of {N} open?",
        ),
    ),
    "population": (
        (
            "{S} counts {V} people.",
            "{P} residents number {V}.",
            "{S} houses {V} residents.",
            "{S} has grown to {V} people.",
        ),
        (
            "What number of people live in {N}?",
            "How big is the population of {N}?",
            "To how many people is {N} home?",
        ),
    ),
}

OPENINGS = (
    "It is known that ",
    "Everyone says that ",
    "The archive says that ",
    "As far as we know, ",
    "These days ",
    "The letters show that ",
    "In short, ",
)
ENDINGS = (
    ", as everyone knows.",
    ", the archive says.",
    ", and so it will stay.",
    " these days.",
    ", it is said.",
    ", to this day.",
)
LEADS = ("Please say: ", "Tell me this. ", "One more question: ", "Now, ")
