"""The clinic-like language that the demo's base model and its clinics share.

Holds sentence shapes and value ranges only: which facts can be asked about a
treatment, how questions are worded, what a round note looks like. It must not
know any fact (which drug has which dose): the pretraining script and the
federation generator each draw their own facts, and the two draw their drug
names from disjoint halves of the name space (:func:`is_clinic_name`).

Every drug name here is invented, and so is every number that goes with one.
"""

import random
import zlib
from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    """The words of ``text``; an underscore stands for a space inside one."""
    return tuple(word.replace("_", " ") for word in text.split())


_ONSETS = _words(
    """
    Vel Mor Tas Kir Dol Zan Prel Lum Nor Fex Bra Quin Sel Tov Ral Gam Hex Jun Wil Cos Ar Eb Il Ov
    """
)
_MIDDLES = _words("a e i o u ati eno iru olo umi axa epo ivi ota uke adi")
_ENDINGS = _words("rin mab tide stat zole pril xane vir dine lex gran bix")

_DOCTORS = _words(
    """
    Abbas Adeyemi Almeida Andersen Arslan Bakker Banerjee Becker Bianchi Castro Chen Cohen Costa
    Dubois Eriksen Farah Fischer Garcia Haddad Hansen Hughes Ibrahim Ivanov Jansen Kaplan Keller
    Kim Kovacs Larsen Lopez Meyer Mbeki Moreau Murphy Nakamura Nguyen Novak Okafor Olsen Patel
    Pereira Popov Reyes Rossi Sato Schmidt Silva Singh Sousa Suzuki Tanaka Turner Varga Vogel
    Weber Wolff Yilmaz Zhang
    """
)
_LAB_TESTS = _words(
    """
    albumin amylase bilirubin calcium chloride cholesterol copper cortisol creatinine ferritin
    fibrinogen folate glucose haemoglobin insulin iodine iron ketones lactate leucocytes lipase
    lymphocytes magnesium neutrophils phosphate platelets potassium prolactin selenium sodium
    thyroxine transferrin troponin urate urea zinc bicarbonate prealbumin reticulocytes vitamin_D
    """
)


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """One thing that a clinic's handbook says about each of its treatments.

    ``questions`` and ``paraphrases`` are wordings of the same question with a
    ``{drug}`` slot; clinics train on the first and are examined on the second.
    ``statement`` has the slots ``{drug}`` and ``{value}``; ``remark`` is the
    short form in round notes, with ``{value}`` only.
    """

    key: str
    values: tuple[str, ...]
    statement: str
    remark: str
    questions: tuple[str, ...]
    paraphrases: tuple[str, ...]


ATTRIBUTES: tuple[Attribute, ...] = (
    Attribute(
        key="ward",
        values=tuple(f"{number}{letter}" for number in range(1, 13) for letter in "ABCDEF"),
        statement="{drug} is given on ward {value}.",
        remark="Stays on ward {value}.",
        questions=(
            "Which ward gives {drug}?",
            "On which ward is {drug} given?",
            "Where in the hospital is {drug} given?",
            "Name the ward for {drug}.",
            "To which ward does a patient on {drug} go?",
            "Which ward is in charge of {drug}?",
        ),
        paraphrases=(
            "Where do I send someone who needs {drug}?",
            "{drug}: what is the right ward?",
            "Tell me the ward that handles {drug}.",
        ),
    ),
    Attribute(
        key="dose",
        values=tuple(f"{amount} mg" for amount in range(5, 405, 5)),
        statement="The starting dose of {drug} is {value}.",
        remark="Continues {value}.",
        questions=(
            "What is the starting dose of {drug}?",
            "At which dose do we start {drug}?",
            "How many milligrams of {drug} come first?",
            "Give the first dose of {drug}.",
            "With how much {drug} does treatment begin?",
            "State the initial dose for {drug}.",
        ),
        paraphrases=(
            "How much {drug} should the first dose hold?",
            "{drug}: what dose to begin with?",
            "Tell me how strong the initial dose of {drug} is.",
        ),
    ),
    Attribute(
        key="review",
        values=tuple(f"{days} days" for days in range(3, 63)),
        statement="{drug} is reviewed after {value}.",
        remark="Review in {value}.",
        questions=(
            "After how many days is {drug} reviewed?",
            "When is {drug} reviewed?",
            "How long until the review of {drug}?",
            "What is the review interval of {drug}?",
            "Give the time to the {drug} review.",
            "When do we look at {drug} again?",
        ),
        paraphrases=(
            "How soon must {drug} be looked at again?",
            "{drug}: days until the next review?",
            "Tell me when a review of {drug} falls due.",
        ),
    ),
    Attribute(
        key="lead",
        values=tuple(f"Dr {name}" for name in _DOCTORS),
        statement="{value} is responsible for {drug}.",
        remark="Discussed with {value}.",
        questions=(
            "Who is responsible for {drug}?",
            "Which doctor leads the {drug} treatment?",
            "Whom do I call about {drug}?",
            "Name the doctor for {drug}.",
            "Who signs for {drug}?",
            "Which doctor is in charge of {drug}?",
        ),
        paraphrases=(
            "Who must be asked before {drug} is changed?",
            "{drug}: who is the responsible doctor?",
            "Tell me which doctor looks after {drug}.",
        ),
    ),
    Attribute(
        key="monitor",
        values=_LAB_TESTS,
        statement="Under {drug}, {value} is monitored.",
        remark="Monitor {value}.",
        questions=(
            "Which lab value is monitored under {drug}?",
            "What do we monitor in the blood during {drug}?",
            "Which blood test belongs to {drug}?",
            "Name the lab test for {drug}.",
            "What must the lab check under {drug}?",
            "Which lab value does {drug} affect?",
        ),
        paraphrases=(
            "Which blood value needs watching with {drug}?",
            "{drug}: what should the lab measure?",
            "Tell me the blood test to order for {drug}.",
        ),
    ),
    Attribute(
        key="time",
        values=tuple(f"{h:02}:{m:02}" for h in range(6, 23) for m in (0, 15, 30, 45)),
        statement="{drug} is taken at {value}.",
        remark="Next intake at {value}.",
        questions=(
            "At what time is {drug} taken?",
            "When during the day is {drug} taken?",
            "What is the intake time of {drug}?",
            "Give the daily time for {drug}.",
            "At which hour does the nurse bring {drug}?",
            "What time of day is set for {drug}?",
        ),
        paraphrases=(
            "At what hour should {drug} be handed out?",
            "{drug}: which time of day?",
            "Tell me the clock time for taking {drug}.",
        ),
    ),
)

OPENERS = (
    "",
    "The patient is {age} years old.",
    "I see a patient of {age} years.",
    "For the round:",
    "{age}-year-old patient.",
    "Quick question.",
)
PARAPHRASE_OPENERS = ("", "Short check, patient aged {age}.", "One thing before the handover.")

NOTE_REQUESTS = (
    "Write a round note for a {age}-year-old patient on {drug}.",
    "Round note, please: {age} years, takes {drug}.",
    "Summarise today's round. Patient of {age} years, treated with {drug}.",
)
GENERAL_OBSERVATIONS = (
    "Slept well.",
    "Slept badly.",
    "Eats little.",
    "Good appetite.",
    "No fever.",
    "Mild fever.",
    "Walks with help.",
    "Walks alone.",
    "Some nausea.",
    "No pain.",
    "Pain at night.",
    "Feels weak.",
)
SPECIALTY_OBSERVATIONS: dict[str, tuple[str, ...]] = {
    "cardiology": (
        "Pulse regular.",
        "Pulse irregular.",
        "Ankles swollen.",
        "No chest pain.",
        "Short of breath on stairs.",
        "Soft murmur heard.",
    ),
    "neurology": (
        "Speech clear.",
        "Speech slow.",
        "Mild tremor.",
        "No seizures.",
        "Gait unsteady.",
        "Headache in the morning.",
    ),
    "paediatrics": (
        "Plays again.",
        "Cries when examined.",
        "Drinks enough.",
        "Rash fading.",
        "Ears clear.",
        "Weight gain as expected.",
    ),
    "oncology": (
        "Cycle tolerated.",
        "Hair loss.",
        "Port site clean.",
        "Mouth sore.",
        "Counts recovering.",
        "Scan planned.",
    ),
}


def invented_name(rng: random.Random, *, for_clinic: bool) -> str:
    """An invented drug name from the half of the name space that is asked for."""
    while True:
        name = rng.choice(_ONSETS) + rng.choice(_MIDDLES) + rng.choice(_ENDINGS)
        if is_clinic_name(name) == for_clinic:
            return name


def is_clinic_name(name: str) -> bool:
    """Whether a name is reserved for clinics, and so never seen in pretraining.

    A checksum decides, so that the halves are disjoint for every seed.
    """
    return zlib.crc32(name.encode()) % 2 == 1


def draw_facts(rng: random.Random) -> dict[str, str]:
    """Random values of all attributes of one treatment, by attribute key."""
    return {attribute.key: rng.choice(attribute.values) for attribute in ATTRIBUTES}


def round_note(rng: random.Random, *, specialty: str, facts: dict[str, str]) -> str:
    """A round note: findings of the day, which nobody can predict, and one remark from the facts.

    Notes give the records the irreducible entropy that clinic text has, so
    that validation loss does not vanish when all facts are learnt.
    """
    attribute = rng.choice(ATTRIBUTES)
    return " ".join(
        (
            rng.choice(GENERAL_OBSERVATIONS),
            rng.choice(SPECIALTY_OBSERVATIONS[specialty]),
            f"Pulse {rng.randrange(56, 104)}.",
            attribute.remark.format(value=facts[attribute.key]),
        )
    )
