"""Names, groups, keywords and questions of the emoji set in its languages.

Texts are Emojibase's (Unicode CLDR) but for a short list of group and subgroup names. Those were translated by machine
from single English words and say something else ("bugs" became software errors, "money" became a total); CORRECTIONS
puts the plain word there, because an answer that no speaker would give teaches nothing.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from emoji_concepts import LEFT_OUT_GROUPS
from emoji_sources import read_json, strip_selectors

LANGUAGES = ("en", "de", "fr", "es", "it", "pt", "nl", "pl", "sv", "ru", "ja", "zh")

CORRECTIONS = {
    "de": {
        "animal-bug": "Insekten",
        "award-medal": "Auszeichnungen",
        "food-sweet": "Süßigkeiten",
        "food-fruit": "Obst",
        "person-sport": "Sport treiben",
        "sport": "Sportarten",
        "hand-prop": "Hand mit Gegenstand",
        "office": "Bürobedarf",
        "mail": "Post",
        "face-concerned": "besorgt",
    },
    "fr": {
        "award-medal": "médailles",
        "sport": "sports",
        "sound": "son",
        "sky-weather": "météo",
        "face-concerned": "inquiet",
        "other-object": "autres objets",
        "other-symbol": "autres symboles",
        "plant-other": "autres plantes",
        "place-other": "autres endroits",
        "food-marine": "fruits de mer",
        "food-fruit": "fruits",
        "writing": "écriture",
    },
    "es": {
        "lock": "candados y llaves",
        "food-sweet": "dulces",
        "hand-prop": "mano con objeto",
        "writing": "escritura",
        "award-medal": "medallas",
        "transport-water": "transporte acuático",
        "food-asian": "comida asiática",
    },
    "it": {
        "face-unwell": "malato",
        "face-concerned": "preoccupato",
        "hand-prop": "mano con oggetto",
        "lock": "lucchetti e chiavi",
        "transport-water": "trasporto via acqua",
        "sky-weather": "tempo atmosferico",
        "award-medal": "medaglie",
        "event": "eventi e festività",
        "drink": "bevande",
        "household": "articoli per la casa",
        "food-asian": "cibo asiatico",
        "person-symbol": "simboli di persone",
    },
    "pt": {
        "money": "dinheiro",
        "lock": "cadeados e chaves",
        "food-sweet": "doces",
        "cat-face": "rostos de gato",
        "monkey-face": "rostos de macaco",
        "writing": "escrita",
        "award-medal": "medalhas",
        "keycap": "caracteres de teclado",
        "food-asian": "comida asiática",
    },
    "nl": {
        "people-body": "mensen & lichaam",
        "objects": "voorwerpen",
        "animal-bug": "insecten",
        "award-medal": "medailles",
        "lock": "sloten & sleutels",
        "tool": "gereedschap",
        "keycap": "toetsenbordtekens",
        "face-concerned": "bezorgd",
        "food-asian": "Aziatisch eten",
        "medical": "medisch",
        "mail": "post",
        "other-object": "andere voorwerpen",
    },
    "pl": {
        "objects": "przedmioty",
        "animal-bug": "owady",
        "animal-mammal": "ssaki",
        "heart": "serca",
        "monkey-face": "twarze małpy",
        "face-concerned": "zaniepokojony",
        "face-negative": "negatywny",
        "food-fruit": "owoce",
        "place-building": "budynki",
        "place-religious": "budynki sakralne",
        "award-medal": "medale",
        "sport": "sporty",
        "lock": "kłódki & klucze",
        "drink": "napoje",
        "writing": "pisanie",
        "medical": "medycyna",
        "currency": "waluty",
        "gender": "symbole płci",
        "zodiac": "znaki zodiaku",
        "hand-prop": "dłoń z przedmiotem",
        "person-resting": "odpoczynek",
        "tool": "narzędzia",
        "other-object": "inne przedmioty",
        "transport-sign": "znaki drogowe",
        "food-asian": "jedzenie azjatyckie",
    },
    "sv": {
        "animal-bug": "insekter",
        "award-medal": "medaljer",
        "cat-face": "kattansikten",
        "monkey-face": "apansikten",
        "face-unwell": "sjuk",
        "face-concerned": "orolig",
        "person-symbol": "personsymboler",
        "transport-water": "vattentransport",
        "science": "vetenskaplig utrustning",
        "math": "matematiska symboler",
        "sport": "sport",
        "hand-prop": "hand med föremål",
        "objects": "föremål",
        "other-object": "andra föremål",
        "av-symbol": "ljud- och bildsymboler",
        "food-asian": "asiatisk mat",
    },
    "ru": {
        "smileys-emotion": "смайлики и эмоции",
        "people-body": "люди и тело",
        "activities": "занятия",
        "person-activity": "занятия людей",
        "animal-bug": "насекомые",
        "animal-mammal": "млекопитающие",
        "animal-amphibian": "амфибии",
        "animal-reptile": "рептилии",
        "animal-marine": "морские животные",
        "food-marine": "морепродукты",
        "face-smiling": "улыбающиеся лица",
        "face-hand": "с руками",
        "face-hat": "в шляпах",
        "cat-face": "лица кошек",
        "monkey-face": "лица обезьян",
        "emotion": "эмоции",
        "hand-fingers-open": "открытая ладонь",
        "hand-single-finger": "указывающий палец",
        "hand-fingers-closed": "сжатые пальцы",
        "hand-prop": "рука с предметом",
        "person": "люди",
        "place-other": "другие места",
        "event": "события и праздники",
        "arts-crafts": "искусство и ремёсла",
        "light-video": "свет, плёнка и видео",
        "game": "игры и хобби",
        "lock": "замки и ключи",
        "currency": "валюты",
        "alphanum": "буквенно-цифровые символы",
        "food-asian": "азиатская еда",
        "person-resting": "отдых",
    },
    "ja": {
        "smileys-emotion": "顔と感情",
        "people-body": "人と体",
        "animals-nature": "動物と自然",
        "food-drink": "食べ物と飲み物",
        "travel-places": "旅行と場所",
        "activities": "アクティビティ",
        "objects": "物",
        "symbols": "記号",
        "person-activity": "人の活動",
        "animal-bug": "虫",
        "animal-mammal": "哺乳類",
        "animal-amphibian": "両生類",
        "face-tongue": "舌を出した顔",
        "face-hand": "手を添えた顔",
        "face-hat": "帽子の顔",
        "face-glasses": "メガネの顔",
        "face-concerned": "心配顔",
        "face-negative": "不機嫌な顔",
        "face-costume": "仮装と生き物",
        "hand-fingers-partial": "手のサイン",
        "hand-fingers-open": "開いた手",
        "hand-fingers-closed": "閉じた手",
        "hand-prop": "物を持つ手",
        "person-symbol": "人の記号",
        "person-sport": "スポーツをする人",
        "food-asian": "アジア料理",
        "food-sweet": "お菓子",
        "drink": "飲み物",
        "transport-water": "水上輸送",
        "award-medal": "メダル",
        "phone": "電話",
        "money": "お金",
        "writing": "筆記具",
        "lock": "錠と鍵",
        "tool": "道具",
        "medical": "医療",
        "music": "音楽",
        "warning": "警告記号",
        "zodiac": "星座",
        "other-object": "その他の物",
    },
    "zh": {
        "smileys-emotion": "笑脸和情感",
        "people-body": "人和身体",
        "animals-nature": "动物和自然",
        "food-drink": "食物和饮料",
        "travel-places": "旅行和地点",
        "activities": "活动",
        "objects": "物品",
        "symbols": "符号",
        "face-smiling": "微笑",
        "face-affection": "爱意",
        "face-hand": "带手的脸",
        "face-hat": "戴帽子的脸",
        "face-glasses": "戴眼镜的脸",
        "face-concerned": "担忧",
        "face-costume": "装扮和怪物",
        "hand-fingers-open": "张开的手",
        "hand-fingers-partial": "手势",
        "hand-prop": "拿东西的手",
        "hands": "双手",
        "person-gesture": "做手势的人",
        "person-role": "职业角色",
        "person-fantasy": "奇幻人物",
        "person-activity": "人的活动",
        "person-sport": "体育运动的人",
        "person-symbol": "人形符号",
        "animal-mammal": "哺乳动物",
        "animal-bird": "鸟类",
        "animal-reptile": "爬行动物",
        "animal-marine": "水生动物",
        "animal-bug": "昆虫",
        "plant-flower": "花卉",
        "food-fruit": "水果",
        "food-vegetable": "蔬菜",
        "food-prepared": "熟食",
        "food-asian": "亚洲食物",
        "food-marine": "海鲜",
        "food-sweet": "甜食",
        "drink": "饮品",
        "place-map": "地图和地球仪",
        "place-building": "建筑",
        "place-other": "其他地点",
        "event": "节日和活动",
        "light-video": "灯光和影像",
        "book-paper": "书和纸",
        "phone": "电话",
        "writing": "书写工具",
        "office": "办公用品",
        "lock": "锁和钥匙",
        "medical": "医疗",
        "household": "家居用品",
        "other-object": "其他物品",
        "other-symbol": "其他符号",
        "geometric": "形状和颜色",
    },
}
"""Language -> group or subgroup key -> the name to use instead of the package's."""

TASKS = ("group", "subgroup", "name")
NEUTRAL_QUESTIONS = {
    "group": "What group is this?",
    "subgroup": "What kind of thing is this?",
    "name": "What is this?",
}
"""The question that gives no language away: the same for every client."""

CLIENT_QUESTIONS = {
    "en": ("Which topic does this picture belong to?", "What sort of thing does it show?", "What is this called?"),
    "de": ("Zu welchem Thema gehört dieses Bild?", "Was für eine Art von Ding ist das?", "Wie heißt das?"),
    "fr": ("À quel thème appartient cette image ?", "De quel type de chose s’agit-il ?", "Comment ça s’appelle ?"),
    "es": ("¿A qué tema pertenece esta imagen?", "¿Qué tipo de cosa es esto?", "¿Cómo se llama esto?"),
    "it": ("A quale tema appartiene questa immagine?", "Che tipo di cosa è questa?", "Come si chiama questo?"),
    "pt": ("A que tema pertence esta imagem?", "Que tipo de coisa é esta?", "Como se chama isto?"),
    "nl": ("Bij welk thema hoort deze afbeelding?", "Wat voor soort ding is dit?", "Hoe heet dit?"),
    "pl": ("Do jakiego tematu należy ten obrazek?", "Jaki to rodzaj rzeczy?", "Jak to się nazywa?"),
    "sv": ("Vilket ämne hör bilden till?", "Vad är det för slags sak?", "Vad heter det här?"),
    "ru": ("К какой теме относится эта картинка?", "Что это за вид предмета?", "Как это называется?"),
    "ja": ("この絵はどのテーマに属しますか？", "これはどんな種類のものですか？", "これは何と呼ばれますか？"),
    "zh": ("这张图片属于哪个主题？", "这是哪一类东西？", "这个叫什么？"),
}
"""Language -> the question of each task, in the order of TASKS."""


@dataclass(frozen=True)
class Concept:
    """One emoji: code point, English keys of its group and subgroup, and its texts by language."""

    code: str
    group: str
    subgroup: str
    names: dict[str, dict]

    @property
    def names_json(self) -> str:
        return json.dumps(self.names, ensure_ascii=False, sort_keys=True)


def read_messages(folder: Path, language: str) -> dict[str, str]:
    """Group and subgroup key -> its name in `language`, corrected."""
    messages = read_json(folder / language / "messages.json")
    names = {entry["key"]: entry["message"] for part in ("groups", "subgroups") for entry in messages[part]}
    corrections = CORRECTIONS.get(language, {})
    if unknown := sorted(set(corrections) - set(names)):
        raise KeyError(f"corrections for {language!r} name keys that the texts do not have: {unknown}")
    return names | corrections


def read_concepts(folder: Path) -> dict[str, Concept]:
    """Code point -> concept, for every base emoji of the package outside LEFT_OUT_GROUPS."""
    messages = read_json(folder / "en" / "messages.json")
    groups = {entry["order"]: entry["key"] for entry in messages["groups"]}
    subgroups = {entry["order"]: entry["key"] for entry in messages["subgroups"]}
    names = {language: read_messages(folder, language) for language in LANGUAGES}
    entries = {
        language: {strip_selectors(e["hexcode"]): e for e in read_json(folder / language / "data.json")}
        for language in LANGUAGES
    }
    concepts = {}
    for code, entry in sorted(entries["en"].items()):
        group = groups.get(entry.get("group"))
        if group is None or group in LEFT_OUT_GROUPS:
            continue
        subgroup = subgroups[entry["subgroup"]]
        texts = {
            language: {
                "label": entries[language][code]["label"],
                "group": names[language][group],
                "subgroup": names[language][subgroup],
                "tags": entries[language][code].get("tags", []),
            }
            for language in LANGUAGES
        }
        concepts[code] = Concept(code, group, subgroup, texts)
    return concepts
