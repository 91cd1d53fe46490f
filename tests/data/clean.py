"""Five data sets without a fault, made from a seed."""

import random

SAID = """
en river stone light garden winter music teacher window bridge letter market silver mountain paper kitchen doctor
en village engine summer forest island answer question number simple careful bright quiet heavy narrow
de Fluss Stein Licht Garten Winter Musik Lehrer Fenster Brücke Brief Markt Silber Gebirge Papier Küche Straße größer
de schön fünf über Wälder Bäume
fr rivière pierre lumière jardin hiver musique fenêtre lettre marché forêt où déjà très être élève façon cœur
pt rio pedra luz jardim inverno música não janela ponte carta mercado prata montanha ÂNGULO AÇÃO maçã
ru река камень свет сад зима музыка учитель окно мост письмо рынок серебро гора бумага кухня врач
zh 河 石 光 花 园 冬 天 音 乐 老 师 窗 户 桥 信 市 场 银 山 纸 厨 房 医 生 村 发 动 机 夏 森 林 岛
ar نهر حجر ضوء حديقة شتاء موسيقى معلم نافذة جسر رسالة سوق فضة جبل ورق مطبخ طبيب
hi नदी पत्थर प्रकाश बगीचा सर्दी संगीत शिक्षक खिड़की पुल पत्र बाज़ार चाँदी पहाड़ कागज़
ja 川 石 光 庭 冬 音 楽 先 生 窓 橋 手 紙 市 場 銀 山 台 所 医 者 村 夏 森 島 こ た え し つ も ん
"""
WORDS: dict[str, list[str]] = {}
for line in SAID.strip().splitlines():
    WORDS.setdefault(line[:2], []).extend(line.split()[1:])
STOP = {"zh": "。", "ja": "。", "hi": "।"}
PLACES = list(WORDS)


def sentence(draw, language="en", least=6, most=14):
    space = "" if language in ("zh", "ja") else " "
    words = [draw.choice(WORDS[language]) for _ in range(draw.randint(least, most))]
    return space.join(words).capitalize() + STOP.get(language, ".")


def said(draw, count, language="en"):
    space = "" if language in ("zh", "ja") else " "
    return space.join(sentence(draw, language) for _ in range(count))


def chat(draw):
    if draw.random() < 0.3:
        return {
            "messages": [turn("system", said(draw, 1)), turn("user", said(draw, 1)), turn("assistant", said(draw, 2))]
        }
    return {"messages": [turn("user", said(draw, 1)), turn("assistant", said(draw, 2))]}


def completion(draw):
    return {"prompt": f"Question {said(draw, 1)}", "completion": f" {said(draw, draw.randint(1, 3))}"}


def text(draw):
    return {"text": "\n\n".join(said(draw, draw.randint(2, 4)) for _ in range(2))}


def tools(draw):
    name = draw.choice(["find", "weather", "add"])
    call = {"type": "function", "id": "c1", "function": {"name": name, "arguments": {"what": draw.choice(WORDS["en"])}}}
    turns = [turn("user", said(draw, 1)), {"role": "assistant", "content": None, "tool_calls": [call]}]
    turns += [turn("tool", f'{{"found": {draw.randint(0, 999)}}}'), turn("assistant", said(draw, 2))]
    known = [{"type": "function", "function": {"name": n, "parameters": {}}} for n in ("find", "weather", "add")]
    return {"messages": turns, "tools": known}


def languages(draw):
    language = draw.choice(PLACES)
    count = draw.randint(2, 3)
    return {
        "messages": [
            turn(role, said(draw, 1 + (role == "assistant"), language))
            for _ in range(count)
            for role in ("user", "assistant")
        ]
    }


def turn(role, content):
    return {"role": role, "content": content}


SETS = {"chat": chat, "completion": completion, "text": text, "tools": tools, "languages": languages}


def rows(name, count=40, seed=0):
    draw = random.Random(f"{name} {seed}")
    return [SETS[name](draw) for _ in range(count)]
