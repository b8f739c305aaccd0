"""The words of the tiny world: every concept with its synonyms in English, German and Chinese.

The first synonym is the usual one; how much likelier it is than the others is the construction's choice (`style.py`).
Within one language a word belongs to one concept of a slot only, so a sentence says what it means.
"""

from __future__ import annotations

from typing import NamedTuple


class GermanNoun(NamedTuple):
    """A German noun: its gender (`m`, `f`, `n`), its form, and its form in accusative and dative if that differs."""

    gender: str
    form: str
    oblique: str = ""


class GermanVerb(NamedTuple):
    """A German verb in the third person singular, and the case of its object (`acc` or `dat`)."""

    form: str
    case: str = "acc"


class Noun(NamedTuple):
    """A noun concept; `measures` are the Chinese measure words it takes, the usual one first."""

    en: tuple[str, ...]
    de: tuple[GermanNoun, ...]
    zh: tuple[str, ...]
    measures: tuple[str, ...]


class Verb(NamedTuple):
    """A transitive verb concept."""

    en: tuple[str, ...]
    de: tuple[GermanVerb, ...]
    zh: tuple[str, ...]


class Adjective(NamedTuple):
    """An adjective concept; German has the stem that endings are put to, Chinese the form with its particle."""

    en: tuple[str, ...]
    de: tuple[str, ...]
    zh: tuple[str, ...]


class Adverb(NamedTuple):
    """An adverb concept."""

    en: tuple[str, ...]
    de: tuple[str, ...]
    zh: tuple[str, ...]


_m, _f, _n = "m", "f", "n"
_N, _V = GermanNoun, GermanVerb
_PERSON = ("位", "个")

PERSONS: dict[str, Noun] = {
    "woman": Noun(("woman", "lady"), (_N(_f, "Frau"), _N(_f, "Dame")), ("女人", "女士"), _PERSON),
    "man": Noun(("man", "gentleman"), (_N(_m, "Mann"), _N(_m, "Herr", "Herrn")), ("男人", "男士"), _PERSON),
    "child": Noun(("child", "kid"), (_N(_n, "Kind"), _N(_n, "Kleinkind")), ("孩子", "小孩"), _PERSON),
    "teacher": Noun(
        ("teacher", "instructor"), (_N(_m, "Lehrer"), _N(_m, "Pädagoge", "Pädagogen")), ("老师", "教师"), _PERSON
    ),
    "doctor": Noun(("doctor", "physician"), (_N(_m, "Arzt"), _N(_m, "Mediziner")), ("医生", "大夫"), _PERSON),
    "boy": Noun(("boy", "lad"), (_N(_m, "Junge", "Jungen"), _N(_m, "Knabe", "Knaben")), ("男孩", "少年"), _PERSON),
    "girl": Noun(("girl", "lass"), (_N(_n, "Mädchen"), _N(_n, "Mädel")), ("女孩", "姑娘"), _PERSON),
    "merchant": Noun(("merchant", "trader"), (_N(_m, "Händler"), _N(_m, "Kaufmann")), ("商人", "商贩"), _PERSON),
    "farmer": Noun(("farmer", "peasant"), (_N(_m, "Bauer", "Bauern"), _N(_m, "Landwirt")), ("农民", "农夫"), _PERSON),
    "nurse": Noun(("nurse", "carer"), (_N(_f, "Pflegerin"), _N(_f, "Krankenschwester")), ("护士", "护理员"), _PERSON),
}

THINGS: dict[str, Noun] = {
    "book": Noun(("book", "volume"), (_N(_n, "Buch"), _N(_m, "Band")), ("书籍", "图书"), ("本",)),
    "car": Noun(("car", "automobile"), (_N(_n, "Auto"), _N(_m, "Wagen")), ("汽车", "轿车"), ("辆",)),
    "bicycle": Noun(("bicycle", "bike"), (_N(_n, "Fahrrad"), _N(_n, "Rad")), ("自行车", "单车"), ("辆",)),
    "house": Noun(("house", "building"), (_N(_n, "Haus"), _N(_n, "Gebäude")), ("房子", "楼房"), ("座",)),
    "painting": Noun(("painting", "picture"), (_N(_n, "Bild"), _N(_n, "Gemälde")), ("图画", "画作"), ("幅",)),
    "coat": Noun(("coat", "overcoat"), (_N(_m, "Mantel"), _N(_f, "Jacke")), ("大衣", "外套"), ("件",)),
    "chair": Noun(("chair", "seat"), (_N(_m, "Stuhl"), _N(_m, "Sessel")), ("椅子", "座椅"), ("把",)),
    "letter": Noun(("letter", "note"), (_N(_m, "Brief"), _N(_n, "Schreiben")), ("信件", "书信"), ("封",)),
    "computer": Noun(("computer", "machine"), (_N(_m, "Computer"), _N(_m, "Rechner")), ("电脑", "计算机"), ("台",)),
    "lamp": Noun(("lamp", "light"), (_N(_f, "Lampe"), _N(_f, "Leuchte")), ("台灯", "灯具"), ("盏",)),
}

VERBS_WITH_THINGS: dict[str, Verb] = {
    "buy": Verb(
        ("buys", "purchases", "acquires"), (_V("kauft"), _V("erwirbt"), _V("besorgt")), ("购买", "买下", "采购")
    ),
    "sell": Verb(("sells", "trades"), (_V("verkauft"), _V("veräußert")), ("出售", "卖掉", "变卖")),
    "find": Verb(("finds", "discovers", "spots"), (_V("findet"), _V("entdeckt")), ("找到", "发现")),
    "repair": Verb(("repairs", "fixes", "mends"), (_V("repariert"), _V("richtet")), ("修理", "维修", "修好")),
    "clean": Verb(
        ("cleans", "washes", "scrubs"), (_V("reinigt"), _V("putzt"), _V("säubert")), ("清洗", "擦洗", "清理")
    ),
    "examine": Verb(
        ("examines", "inspects", "checks"), (_V("prüft"), _V("untersucht"), _V("mustert")), ("检查", "查看", "察看")
    ),
    "describe": Verb(
        ("describes", "depicts", "portrays"),
        (_V("beschreibt"), _V("schildert"), _V("erläutert")),
        ("描述", "描写", "形容"),
    ),
    "need": Verb(("needs", "requires"), (_V("braucht"), _V("benötigt")), ("需要", "急需")),
}

VERBS_WITH_PERSONS: dict[str, Verb] = {
    "help": Verb(
        ("helps", "assists", "supports"),
        (_V("hilft", "dat"), _V("unterstützt"), _V("assistiert", "dat")),
        ("帮助", "协助", "支持"),
    ),
    "thank": Verb(("thanks",), (_V("dankt", "dat"),), ("感谢", "答谢")),
    "meet": Verb(("meets", "encounters"), (_V("trifft"), _V("begegnet", "dat")), ("遇见", "碰到", "碰见")),
    "follow": Verb(("follows", "trails", "pursues"), (_V("folgt", "dat"), _V("verfolgt")), ("跟随", "追随", "跟着")),
    "trust": Verb(("trusts", "believes"), (_V("vertraut", "dat"), _V("glaubt", "dat")), ("信任", "相信")),
    "admire": Verb(
        ("admires", "respects", "esteems"),
        (_V("bewundert"), _V("verehrt"), _V("schätzt")),
        ("敬佩", "佩服", "欣赏"),
    ),
    "greet": Verb(
        ("greets", "welcomes", "hails"), (_V("begrüßt"), _V("grüßt"), _V("empfängt")), ("问候", "迎接", "招呼")
    ),
    "advise": Verb(("advises", "counsels"), (_V("berät"), _V("rät", "dat")), ("劝告", "劝说", "忠告")),
}

ADJECTIVES_OF_PERSONS: dict[str, Adjective] = {
    "aged": Adjective(("old", "elderly", "aged"), ("alt", "betagt"), ("年老的", "年迈的")),
    "young": Adjective(("young", "youthful"), ("jung", "jugendlich"), ("年轻的", "年少的")),
    "friendly": Adjective(
        ("friendly", "kind", "nice"), ("freundlich", "nett", "lieb"), ("友好的", "和善的", "友善的")
    ),
    "tired": Adjective(("tired", "weary", "exhausted"), ("müd", "erschöpft", "matt"), ("疲惫的", "疲倦的", "劳累的")),
    "famous": Adjective(
        ("famous", "renowned", "celebrated"), ("berühmt", "bekannt", "gefeiert"), ("著名的", "有名的", "知名的")
    ),
    "clever": Adjective(("clever", "smart", "bright"), ("klug", "schlau", "gescheit"), ("聪明的", "机灵的", "聪慧的")),
}

ADJECTIVES_OF_THINGS: dict[str, Adjective] = {
    "new": Adjective(("new", "modern"), ("neu", "modern"), ("崭新的", "全新的")),
    "used": Adjective(("old", "used", "worn"), ("alt", "gebraucht"), ("破旧的", "陈旧的")),
    "big": Adjective(("big", "large", "huge"), ("groß", "riesig", "mächtig"), ("巨大的", "庞大的")),
    "beautiful": Adjective(
        ("beautiful", "pretty", "lovely"), ("schön", "hübsch", "herrlich"), ("漂亮的", "美丽的", "好看的")
    ),
    "expensive": Adjective(
        ("expensive", "costly", "pricey"), ("teur", "kostspielig", "kostbar"), ("昂贵的", "贵重的")
    ),
    "strange": Adjective(
        ("strange", "odd", "weird"), ("seltsam", "merkwürdig", "komisch"), ("奇怪的", "古怪的", "怪异的")
    ),
}

ADVERBS: dict[str, Adverb] = {
    "now": Adverb(("now", "currently", "presently"), ("jetzt", "nun", "derzeit"), ("现在", "目前", "此刻")),
    "often": Adverb(("often", "frequently", "regularly"), ("oft", "häufig", "öfters"), ("经常", "常常", "时常")),
    "usually": Adverb(
        ("usually", "normally", "generally"), ("meistens", "gewöhnlich", "normalerweise"), ("通常", "一般", "平常")
    ),
    "suddenly": Adverb(("suddenly", "abruptly"), ("plötzlich", "unvermittelt"), ("突然", "忽然")),
    "finally": Adverb(("finally", "eventually"), ("endlich", "schließlich"), ("终于", "最终")),
    "secretly": Adverb(("secretly", "quietly"), ("heimlich", "insgeheim"), ("暗中", "悄悄地")),
}

PARTICLES = {"en": "really", "de": "wirklich", "zh": "真的"}
"""An optional word that adds emphasis and no meaning that is told apart."""
