"""An invented grammar of short English-like stories.

What it is for: text that anybody may ship, on which a very small language model learns something in minutes. The vocabulary
is a few hundred words. The sentences agree with each other over a distance (a person keeps the same pronoun, trade and
town through a story; a thing keeps its colour; counted things are plural), so a model that reads far back does better than
one that does not, and yet every story makes fresh random choices that nobody can foresee.

`story(rng)` is the whole interface; everything is a function of the random generator handed in.
"""

import random

PEOPLE = {
    "she": "Anna Berta Clara Dora Edith Flora Greta Helen Irma Judith Karen Laura Martha Nora Olga Paula Rosa Sophie Tilda Vera".split(),
    "he": "Adam Boris Carl David Emil Felix Gustav Henry Isaac Jacob Konrad Leo Martin Niels Oscar Peter Robert Simon Thomas Victor".split(),
}
POSSESSIVE = {"she": "her", "he": "his", "they": "their"}
OBJECT_FORM = {"she": "her", "he": "him", "they": "them"}
TOWNS = "Aldmoor Brenwick Carrow Dunhaven Eastfold Farlow Grenby Holm Ivelstone Karsten Lowmere Marren Northgate Orlby Pennick Quarrel Redmouth Stanway".split()
TRADES = {
    "baker": ("bread", "oven"),
    "carpenter": ("chair", "bench"),
    "clockmaker": ("clock", "hammer"),
    "doctor": ("letter", "lamp"),
    "farmer": ("cart", "plough"),
    "fisher": ("net", "boat"),
    "gardener": ("ladder", "spade"),
    "glassblower": ("bottle", "furnace"),
    "librarian": ("book", "shelf"),
    "miller": ("sack", "wheel"),
    "painter": ("picture", "brush"),
    "potter": ("jar", "kiln"),
    "printer": ("map", "press"),
    "saddler": ("saddle", "knife"),
    "tailor": ("coat", "needle"),
    "weaver": ("blanket", "loom"),
}
PLURALS = {"bread": "loaves", "knife": "knives", "shelf": "shelves", "brush": "brushes", "press": "presses", "bench": "benches"}
COLOURS = "black blue brown green grey red white yellow".split()
SIZES = "small large heavy narrow round broken ancient plain".split()
WEATHER = [
    "it rained",
    "it snowed",
    "the wind was cold",
    "the sun was hot",
    "the fog was thick",
    "the river was high",
    "the roads were empty",
    "the bells were silent",
]
SEASONS = "spring summer autumn winter".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
NUMBERS = "two three four five six seven eight nine ten".split()
PLACES = "market harbour bridge mill chapel garden station square tavern forest".split()
MOODS = "happy tired angry proud worried calm curious lonely".split()
ADVERBS = "slowly quickly quietly carefully gladly alone".split()
TRANSITIVE = {  # past, present plural, present singular
    "carried": ("carry", "carries"),
    "repaired": ("repair", "repairs"),
    "lost": ("lose", "loses"),
    "found": ("find", "finds"),
    "sold": ("sell", "sells"),
    "bought": ("buy", "buys"),
    "cleaned": ("clean", "cleans"),
    "hid": ("hide", "hides"),
    "showed": ("show", "shows"),
    "wanted": ("want", "wants"),
    "dropped": ("drop", "drops"),
    "borrowed": ("borrow", "borrows"),
}
KIN = {"she": ["sister", "mother", "aunt", "daughter"], "he": ["brother", "father", "uncle", "son"]}


def plural(noun):
    """The plural of one of the nouns above."""
    return PLURALS.get(noun, noun + "s")


def article(word):
    """The indefinite article that fits the sound of `word`."""
    return "an" if word[0] in "aeiou" else "a"


class Scene:
    """What a story has decided once and later sentences must agree with."""

    def __init__(self, rng):
        self.rng = rng
        self.pronoun, self.other_pronoun = rng.choice(["she", "he"]), rng.choice(["she", "he"])
        self.hero = rng.choice(PEOPLE[self.pronoun])
        self.friend = rng.choice([name for name in PEOPLE[self.other_pronoun] if name != self.hero])
        self.trade, self.friend_trade = rng.sample(sorted(TRADES), 2)
        self.town, self.far_town = rng.sample(TOWNS, 2)
        self.thing, self.tool = TRADES[self.trade]
        self.colour, self.size = rng.choice(COLOURS), rng.choice(SIZES)
        self.place, self.day = rng.choice(PLACES), rng.choice(DAYS)
        self.count = rng.choice(NUMBERS)
        self.kin_pronoun = rng.choice(["she", "he"])
        self.kin = rng.choice(KIN[self.kin_pronoun])

    @property
    def them(self):
        """The hero's possessive pronoun."""
        return POSSESSIVE[self.pronoun]


def opening(s):
    where = s.rng.choice([f"In {s.town}", f"In the town of {s.town}", f"Near the {s.place} of {s.town}"])
    return s.rng.choice(
        [
            f"{where} there lived {article(s.trade)} {s.trade} whose name was {s.hero}.",
            f"{where} lived {s.hero}, {article(s.trade)} {s.trade}, with {s.them} {s.kin}.",
            f"{s.hero} was {article(s.trade)} {s.trade} in {s.town}, and {s.them} {s.kin} was {article(s.friend_trade)} {s.friend_trade}.",
        ]
    )


def weather(s):
    moment = s.rng.choice(
        [f"On {s.day}", f"One {s.rng.choice(SEASONS)} morning", f"That {s.rng.choice(SEASONS)}", "That evening"]
    )
    return f"{moment} {s.rng.choice(WEATHER)}, and {s.pronoun} walked {s.rng.choice(ADVERBS)} to the {s.place}."


def the_thing(s):
    verb = s.rng.choice(sorted(TRANSITIVE))
    return s.rng.choice(
        [
            f"{s.pronoun.capitalize()} {verb} a {s.colour} {s.thing} at the {s.place}.",
            f"There {s.pronoun} {verb} {article(s.size)} {s.size} {s.thing}, which was {s.colour}.",
            f"With {s.them} {s.tool} {s.pronoun} {verb} {s.count} {s.colour} {plural(s.thing)}.",
        ]
    )


def the_friend(s):
    return s.rng.choice(
        [
            f"{s.friend}, the {s.friend_trade} from {s.far_town}, came by and asked about the {s.colour} {s.thing}.",
            f"Then {s.friend} arrived from {s.far_town}, because {s.other_pronoun} was {article(s.friend_trade)} {s.friend_trade} and needed {article(s.tool)} {s.tool}.",
            f"The {s.friend_trade} of {s.far_town}, who was called {s.friend}, wanted to buy the {s.thing}.",
        ]
    )


def speech(s):
    singular = s.rng.random() < 0.5
    subject, verb = (
        (s.rng.choice(["My " + s.kin, "Nobody", "The " + s.friend_trade]), 1)
        if singular
        else (s.rng.choice(["We", "They", "My friends"]), 0)
    )
    said = f'"{subject} {TRANSITIVE[s.rng.choice(sorted(TRANSITIVE))][verb]} the {s.colour} {s.thing},"'
    return s.rng.choice(
        [
            f"{said} said {s.friend}.",
            f"{said} {s.pronoun} told {OBJECT_FORM[s.other_pronoun]}.",
            f"{said} answered {s.hero}, the {s.trade}.",
        ]
    )


def counting(s):
    left = s.rng.choice(NUMBERS)
    return s.rng.choice(
        [
            f"Of the {s.count} {plural(s.thing)} only {left} were {s.colour}.",
            f"The {plural(s.tool)} that stood near the {s.place} were {s.rng.choice(SIZES)}, but the one {s.hero} {s.rng.choice(sorted(TRANSITIVE))} was {s.size}.",
            f"In {s.rng.randint(1600, 1899)} the {s.place} of {s.far_town} had {left} {plural(s.tool)}.",
        ]
    )


def feeling(s):
    return s.rng.choice(
        [
            f"{s.hero} was {s.rng.choice(MOODS)}, and so was {s.them} {s.kin}.",
            f"Because {s.rng.choice(WEATHER)}, {s.hero} and {s.friend} were {s.rng.choice(MOODS)}, and they went home to {POSSESSIVE['they']} {s.place}.",
            f"{s.pronoun.capitalize()} did not know whether {s.friend} was {s.rng.choice(MOODS)} or {s.rng.choice(MOODS)}.",
        ]
    )


ANIMALS = "cat dog cow hen pig fox owl rat goat bear wolf crow duck hare frog mule lamb swan moth bee".split()
GOODS = "cup hat key box pot bag bell rope ring drum sail pear fig nut egg rug fan pen tin jug log seed coin shoe".split()
SHORT_ADJECTIVES = "old new red big sad odd wet dry hot cold dark long thin kind wise mad lazy pale soft loud".split()
PREPOSITIONS = "near under behind beside above with against for".split()
# past (no agreement), then present singular and plural
TAKE = [
    ("saw", "sees", "see"),
    ("held", "holds", "hold"),
    ("fed", "feeds", "feed"),
    ("hit", "hits", "hit"),
    ("ate", "eats", "eat"),
    ("took", "takes", "take"),
    ("kept", "keeps", "keep"),
    ("met", "meets", "meet"),
    ("drew", "draws", "draw"),
    ("sang to", "sings to", "sing to"),
    ("led", "leads", "lead"),
    ("bit", "bites", "bite"),
]
REST = [
    ("slept", "sleeps", "sleep"),
    ("sat", "sits", "sit"),
    ("ran", "runs", "run"),
    ("hid", "hides", "hide"),
    ("fell", "falls", "fall"),
    ("stood", "stands", "stand"),
]


def noun_phrase(rng, depth):
    """A phrase about animals or goods and whether it is plural; deeper phrases carry a preposition or a relative clause."""
    is_plural = rng.random() < 0.45
    noun = rng.choice(rng.choice([ANIMALS, GOODS]))
    noun = {"wolf": "wolves", "fox": "foxes", "box": "boxes"}.get(noun, noun + "s") if is_plural else noun
    words = [rng.choice(SHORT_ADJECTIVES) for _ in range(rng.choice([0, 0, 1, 1, 2]))] + [noun]
    if is_plural:
        first = rng.choice(["the", "these", "some", "most", rng.choice(NUMBERS)])
    else:
        first = rng.choice(["the", "this", "every", "no", article(words[0])])
    phrase = " ".join([first, *words])
    if depth > 0 and rng.random() < 0.6:
        if rng.random() < 0.5:
            phrase += f" {rng.choice(PREPOSITIONS)} {noun_phrase(rng, depth - 1)[0]}"
        else:
            phrase += f" that {verb_phrase(rng, is_plural, True, depth - 1)}"
    return phrase, is_plural


def verb_phrase(rng, is_plural, present, depth):
    """A verb that agrees with its subject, and what belongs to it."""
    form = 0 if not present else 2 if is_plural else 1
    if rng.random() < 0.6:
        return f"{rng.choice(TAKE)[form]} {noun_phrase(rng, depth)[0]}"
    return f"{rng.choice(REST)[form]} {rng.choice(PREPOSITIONS)} {noun_phrase(rng, depth)[0]}"


def fable(s):
    """A sentence that owes nothing to the scene but agreement within itself, over whatever stands between subject and verb."""
    subject, is_plural = noun_phrase(s.rng, 2)
    sentence = f"{subject} {verb_phrase(s.rng, is_plural, s.rng.random() < 0.7, 1)}."
    return sentence[0].upper() + sentence[1:]


def ledger(s):
    """Sums of money and years, which nobody can foresee."""
    return s.rng.choice(
        [
            f"{s.friend} paid {s.rng.randint(2, 99)} coins for {noun_phrase(s.rng, 0)[0]} and {s.rng.randint(2, 99)} for the {s.colour} {s.thing}.",
            f"In {s.rng.randint(1600, 1899)} {s.hero} {s.rng.choice(TAKE)[0]} {noun_phrase(s.rng, 1)[0]}.",
            f"On {s.rng.choice(DAYS)} {s.pronoun} {s.rng.choice(TAKE)[0]} {noun_phrase(s.rng, 1)[0]}, on {s.rng.choice(DAYS)} {noun_phrase(s.rng, 0)[0]}.",
        ]
    )


def closing(s):
    return s.rng.choice(
        [
            f"At last the {s.trade} gave the {s.colour} {s.thing} to {s.friend} and went back to {s.town}.",
            f"So {s.friend} returned to {s.far_town} without the {s.thing}, and {s.hero} kept {s.them} {s.tool}.",
            f"Since that {s.day} the {s.friend_trade} and the {s.trade} of {s.town} have been friends.",
        ]
    )


MIDDLE = [weather, the_thing, the_friend, speech, counting, feeling] + [fable] * 9 + [ledger] * 3


def story(rng: random.Random) -> str:
    """One paragraph of six to eleven sentences about one scene."""
    scene = Scene(rng)
    middle = [rng.choice(MIDDLE)(scene) for _ in range(rng.randint(4, 9))]
    return " ".join([opening(scene), *middle, closing(scene)])


def text(seed: int, characters: int) -> str:
    """Stories separated by blank lines until at least `characters` characters are written; ends with a newline."""
    rng, stories, length = random.Random(seed), [], 0
    while length < characters:
        stories.append(story(rng))
        length += len(stories[-1]) + 2
    return "\n\n".join(stories) + "\n"
