"""Words that notebook 10 asks models about: capitals, synonyms and French, names that nobody has, lists of pairs."""

import random

_CAPITALS = """
France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon, Austria Vienna, Hungary Budapest,
Poland Warsaw, Greece Athens, Turkey Ankara, Russia Moscow, Ukraine Kiev, Romania Bucharest, Bulgaria Sofia,
Serbia Belgrade, Croatia Zagreb, Ireland Dublin, Scotland Edinburgh, Wales Cardiff, England London, Belgium Brussels,
Norway Oslo, Sweden Stockholm, Finland Helsinki, Denmark Copenhagen, Iceland Reykjavik, Estonia Tallinn, Latvia Riga,
Lithuania Vilnius, Albania Tirana, Egypt Cairo, Morocco Rabat, Algeria Algiers, Tunisia Tunis, Libya Tripoli,
Kenya Nairobi, Uganda Kampala, Nigeria Abuja, Ghana Accra, Senegal Dakar, Zimbabwe Harare, Ethiopia Addis,
Sudan Khartoum, Somalia Mogadishu, Angola Luanda, Israel Jerusalem, Lebanon Beirut, Syria Damascus, Jordan Amman,
Iraq Baghdad, Iran Tehran, Afghanistan Kabul, Pakistan Islamabad, India Delhi, Bangladesh Dhaka, Nepal Kathmandu,
China Beijing, Japan Tokyo, Taiwan Taipei, Vietnam Hanoi, Thailand Bangkok, Indonesia Jakarta, Australia Canberra,
Canada Ottawa, Cuba Havana, Jamaica Kingston, Peru Lima, Chile Santiago, Argentina Buenos, Uruguay Montevideo,
Venezuela Caracas, Colombia Bogota, Ecuador Quito, Bolivia Sucre"""
CAPITALS = [tuple(pair.split()) for pair in _CAPITALS.split(",")]  # (country, first word of its capital)
FACTS = [(*fact, *CAPITALS[i - 9]) for i, fact in enumerate(CAPITALS)]  # with another country and its capital

_SYNONYMS = """
road street route, boat ship bateau, car automobile voiture, doctor physician médecin, shop store magasin,
house home maison, dog hound chien, rabbit bunny lapin, stone rock pierre, king monarch roi, town city ville,
teacher instructor professeur, friend buddy ami, jacket coat veste, lawyer attorney avocat, sea ocean mer,
pig hog cochon, cup mug tasse, hat cap chapeau, chicken hen poulet"""
SYNONYMS = [tuple(words.split()) for words in _SYNONYMS.split(",")]  # (word, synonym, French)


def invented_names(n: int, seed: int) -> list[str]:
    """Names of two to five syllables, without repeats: n or a few less."""
    rng, syllables = random.Random(seed), [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    return list(dict.fromkeys("".join(rng.choices(syllables, k=rng.randint(2, 5))).title() for _ in range(n)))


def pair_lists() -> list[tuple[str, str, list[str]]]:
    """For each word of SYNONYMS a list of six pairs with it in the fourth.

    Gives the text up to its partner, the whole list, and all partners, its own first.
    """
    words, found = [row[0] for row in SYNONYMS], []
    partners = "lamp paper music silver winter bread number garden glass cotton letter butter summer engine".split()
    for i in range(len(words)):
        places = range(i - 3, i + 3)
        pairs = [f" {words[j % len(words)]} {partners[j % len(partners)]}" for j in places]
        listed = [partners[j % len(partners)] for j in (i, *(j for j in places if j != i))]
        found.append(("Pairs:" + ",".join(pairs[:4]), "Pairs:" + ",".join(pairs) + ", ", listed))
    return found
