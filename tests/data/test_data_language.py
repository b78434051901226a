import pytest

from bloomery.data.language import language

SENTENCES = {
    "en": "When the train arrived, there was nobody on the platform but an old man with a dog.",
    "de": "Als der Zug ankam, war niemand auf dem Bahnsteig außer einem alten Mann mit seinem Hund.",
    "fr": "Quand le train est arrivé, il n'y avait personne sur le quai, sauf un vieil homme avec son chien.",
    "es": "Cuando llegó el tren, no había nadie en el andén, salvo un hombre viejo con su perro.",
    "it": "Quando il treno è arrivato, non c'era nessuno sul binario, tranne un vecchio con il suo cane.",
    "pt": "Quando o trem chegou, não havia ninguém na plataforma, a não ser um velho com o seu cachorro.",
    "nl": "Toen de trein aankwam, was er niemand op het perron, behalve een oude man met zijn hond.",
    "sv": "När tåget kom fram var det ingen på perrongen, utom en gammal man som satt där med sin hund.",
    "da": "Da toget kom, var der ikke nogen på perronen, ud over en gammel mand med sin hund.",
    "pl": "Kiedy pociąg przyjechał, na peronie nie było nikogo, tylko stary człowiek z psem, który już spał.",
    "cs": "Když vlak přijel, na nástupišti nikdo nebyl, jen starý muž se psem, který už spal.",
    "ro": "Când a sosit trenul, pe peron nu era nimeni, doar un bătrân cu un câine care nu mai dormea.",
    "hu": "Amikor a vonat megérkezett, már nem volt senki a peronon, csak egy öreg ember és egy kutya.",
    "fi": "Kun juna saapui, laiturilla ei ollut ketään, vain vanha mies ja hänen koiransa, joka nukkui.",
    "tr": "Tren geldiğinde peronda kimse yoktu, sadece yaşlı bir adam ve onun için bekleyen bir köpek vardı.",
    "id": "Ketika kereta itu tiba, tidak ada orang di peron, dan hanya seorang tua dengan anjing yang tidur.",
    "ru": "Когда поезд прибыл, на перроне никого не было, кроме старика с собакой. Мы вышли.",
    "uk": "Коли потяг прибув, на пероні нікого не було, крім старого з його собакою.",
    "bg": "Когато влакът пристигна, на перона нямаше никого освен един старец със своето куче, което спеше дълбоко.",
    "ja": "列車が着いたとき、ホームには犬を連れた老人のほかに誰もいなかった。",
    "zh": "火车到站的时候，站台上除了一位带着狗的老人以外，一个人也没有。",
    "ko": "기차가 도착했을 때 승강장에는 개를 데리고 있는 노인 말고는 아무도 없었다.",
    "ar": "عندما وصل القطار لم يكن هناك أحد على الرصيف إلا رجل عجوز مع كلبه",
    "el": "Όταν έφτασε το τρένο, δεν υπήρχε κανείς στην αποβάθρα.",
}


@pytest.mark.parametrize("code", SENTENCES)
def test_one_sentence_is_enough(code):
    assert language(SENTENCES[code]) == code


@pytest.mark.parametrize("text", ["", "12 + 34 = 46", "for i in range(10): print(i)", "Berlin Hamburg Köln Essen", "…"])
def test_what_has_no_function_words_is_undetermined(text):
    assert language(text) == "und"


def test_the_larger_part_of_the_letters_decides():
    assert language(SENTENCES["de"] * 3 + SENTENCES["ru"]) == "de"
    assert language(SENTENCES["zh"] + " GPU TPU") == "zh"
    assert language(SENTENCES["zh"] * 3 + "カ") == "zh"
