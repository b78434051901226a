"""Which language a text is in, without a model or network: by its script, and within the Latin one by function words.

Prose of a sentence or two is told well (see docs/data.md for what was measured); names, lists, formulas and programs
have few function words and are `und`, undetermined, as BCP 47 has it.
"""

import re
from collections.abc import Mapping

UNDETERMINED = "und"

_SAMPLE_CHARACTERS = 4_000
_FEWEST_WORDS = 4
_FEWEST_DIFFERENT = 3
_LEAST_SHARE = 0.12
_CLOSEST_SECOND = 0.95
_LEAST_SCRIPT_SHARE = 0.5
_KANA_SHARE = 0.05  # Japanese prose is a third kana or more; Chinese quotes a little of it at most
_WORD = re.compile(r"[^\W\d_]+")

_SCRIPTS: Mapping[str, re.Pattern[str]] = {
    name: re.compile(f"[{span}]")
    for name, span in {
        "latin": "A-Za-z\u00c0-\u024f\u1e00-\u1eff", "cyrillic": "\u0400-\u052f", "han": "\u3400-\u9fff",
        "kana": "\u3040-\u30ff", "ko": "\uac00-\ud7af\u1100-\u11ff", "ar": "\u0600-\u06ff", "he": "\u0590-\u05ff",
        "el": "\u0370-\u03ff", "th": "\u0e00-\u0e7f", "hi": "\u0900-\u097f", "bn": "\u0980-\u09ff",
        "ta": "\u0b80-\u0bff", "ka": "\u10a0-\u10ff", "hy": "\u0530-\u058f",
    }.items()
}  # fmt: skip

_FUNCTION_WORDS = {
    "en": "the of and a to in is that it was for on are with as be this by from at or have not which were an you can "
    "has but they their will would there been one all its we if when what do he she his her your more",
    "de": "der die und das ist nicht ein eine zu den von mit sich auf für dem im es sie auch als an werden wird aus "
    "er hat dass bei sind noch nach einer um einen oder wie wir über aber durch kann ich war zum zur nur vor",
    "fr": "le la les de des du et un une est que qui dans pour pas sur au aux avec par plus ce il elle sont ne se en "
    "on cette ont été mais ou nous vous leur son sa ses comme être était fait même aussi deux",
    "es": "el la los las de del y que en un una es por con para no se su al lo como más pero sus le ha este esta son "
    "entre cuando muy sin sobre también fue hasta hay desde todo nos ya o era ser dos yo porque",
    "it": "il lo la gli le di del della dei delle e che un una è per non con sono si da in nel alla come più anche "
    "ma questo questa al dal ha suo sua loro essere ed se stato hanno tra cui era sul dalla nella io",
    "pt": "o a os as de do da dos das e que em um uma é para com não por se na no mais como mas foi ao ele ela são "
    "sua seu ou quando muito há nos já também só pelo pela até isso entre depois sem mesmo aos era",
    "nl": "de het een en van is dat in op te zijn met voor niet aan er om ook als bij door maar die ze hij naar uit "
    "werd wordt kan heeft nog deze over dan hun meer was tot wel geen worden we je zich dit al",
    "sv": "i och att det som en på är av för med till den har de inte om ett var från jag han hon men så kan när vi "
    "ska eller sig vid mot efter under över detta också skulle alla finns mycket dem",
    "da": "i og at det som en på er af for med til den har de ikke om et var fra jeg han hun men så kan når vi skal "
    "eller sig ved mod efter under over dette også blev alle der meget dem være bliver hvor",
    "pl": "i w na z że się nie do jest to o jak ale po co tak za od przez dla czy są był była było tym tego jego jej "
    "ich może które który która oraz być lub już tylko przy bardzo",
    "cs": "a v se na je že to s z do o i jako ale pro za po od by byl byla bylo jsou který která které tak jeho její "
    "nebo také při být až když jen jsem může už podle ve ke bez",
    "ro": "și în de la cu pe un o este nu că din care a fi pentru mai au sunt ca se le ale lui sau prin dar fost cum "
    "el ea această acest după fără până când",
    "hu": "a az és hogy nem egy is van volt de meg mint csak ez azt már ki el ha vagy még lehet ezt aki amely minden "
    "után között majd pedig mert kell lett nagyon",
    "fi": "ja on ei se että oli hän mutta ovat kun niin joka myös tai kuin jos vain sen mitä minä sinä olla ollut "
    "ole hänen tämä nyt sekä ne he mukaan vielä jo kanssa",
    "tr": "ve bir bu için ile da de çok daha ne gibi olarak olan var ama o kadar sonra mi en her değil ya ki ise "
    "olduğu tarafından göre veya diye hem şey",
    "id": "yang dan di itu dengan untuk tidak dari ini dalam akan pada juga ke karena adalah saya ada oleh bisa atau "
    "sudah telah mereka kami dia lebih seperti anda tersebut",
}
_VOTES: dict[str, list[str]] = {}
for _language, _words in _FUNCTION_WORDS.items():
    for _one in _words.split():
        _VOTES.setdefault(_one, []).append(_language)


def language(text: str) -> str:
    """ISO 639-1 code of the language that most of the text's first 4,000 characters are in; `und` where it is unclear.

    A word that several languages share counts for each of them in part; the winner needs three of its words, 12 % of
    all, and a lead.
    """
    sample = text[:_SAMPLE_CHARACTERS]
    if sample.isascii():
        return _latin(sample.lower())
    counts = {name: len(pattern.findall(sample)) for name, pattern in _SCRIPTS.items()}
    letters = sum(counts.values())
    east = counts["han"] + counts["kana"]
    if letters and east > _LEAST_SCRIPT_SHARE * letters:
        return "ja" if counts["kana"] > _KANA_SHARE * east else "zh"
    script = max(counts, key=counts.__getitem__)
    if counts[script] <= _LEAST_SCRIPT_SHARE * letters or counts[script] < _FEWEST_WORDS:
        return UNDETERMINED
    if script == "latin":
        return _latin(sample.lower())
    return _cyrillic(sample.lower()) if script == "cyrillic" else script


def _latin(sample: str) -> str:
    words = _WORD.findall(sample)
    votes: dict[str, float] = {}
    for word in words:
        speakers = _VOTES.get(word, ())
        for name in speakers:
            votes[name] = votes.get(name, 0.0) + 1 / len(speakers)
    best, second = [*sorted(votes, key=votes.__getitem__, reverse=True), "", ""][:2]
    different = {word for word in words if best in _VOTES.get(word, ())}
    if len(words) < _FEWEST_WORDS or len(different) < _FEWEST_DIFFERENT or votes[best] < _LEAST_SHARE * len(words):
        return UNDETERMINED
    return UNDETERMINED if votes.get(second, 0.0) > _CLOSEST_SECOND * votes[best] else best


def _cyrillic(sample: str) -> str:
    """Letters that only one of the languages has."""
    if re.search("[іїєґ]", sample):
        return "be" if "ў" in sample else "uk"
    if re.search("[ыэё]", sample):
        return "ru"
    if re.search("[ђјљњћџ]", sample):
        return "sr"
    return "bg" if sample.count("ъ") * 50 > len(sample) else "ru"
