"""What the classes are called: a phrase for each, from which the study's frozen heads are made without labelled texts.

The paper's vision models have heads like these, from the class names and CLIP's text encoder.
"""

from __future__ import annotations

from collections.abc import Sequence

NEWSGROUPS = {
    "alt.atheism": "atheism",
    "comp.graphics": "computer graphics",
    "comp.os.ms-windows.misc": "Microsoft Windows",
    "comp.sys.ibm.pc.hardware": "PC hardware",
    "comp.sys.mac.hardware": "Apple Macintosh hardware",
    "comp.windows.x": "the X Window System",
    "misc.forsale": "items for sale",
    "rec.autos": "cars",
    "rec.motorcycles": "motorcycles",
    "rec.sport.baseball": "baseball",
    "rec.sport.hockey": "hockey",
    "sci.crypt": "cryptography",
    "sci.electronics": "electronics",
    "sci.med": "medicine",
    "sci.space": "space",
    "soc.religion.christian": "Christianity",
    "talk.politics.guns": "gun politics",
    "talk.politics.mideast": "politics of the Middle East",
    "talk.politics.misc": "politics",
    "talk.religion.misc": "religion",
}
REUTERS = {
    "acq": "corporate mergers and acquisitions",
    "alum": "aluminium",
    "bop": "balance of payments",
    "cpi": "consumer prices and inflation",
    "cpu": "capacity utilisation of industry",
    "crude": "crude oil",
    "dlr": "the US dollar",
    "earn": "company earnings and dividends",
    "fuel": "fuel oil",
    "gas": "gasoline",
    "gnp": "gross national product",
    "instal-debt": "consumer instalment debt",
    "interest": "interest rates",
    "ipi": "industrial production",
    "iron-steel": "iron and steel",
    "jobs": "unemployment and jobs",
    "lei": "leading economic indicators",
    "meal-feed": "meal and animal feed",
    "money-fx": "foreign exchange and money markets",
    "money-supply": "money supply",
    "nat-gas": "natural gas",
    "pet-chem": "petrochemicals",
    "platinum": "platinum metal",
    "reserves": "foreign currency reserves",
    "retail": "retail sales",
    "ship": "shipping",
    "strategic-metal": "strategic metals",
    "trade": "international trade",
    "veg-oil": "vegetable oil",
    "wpi": "wholesale prices",
}
TEMPLATES: dict[str, tuple[str, dict[str, str]]] = {
    "newsgroups": ("a post about {}", NEWSGROUPS),
    "reuters": ("news about {}", REUTERS),
    "election": ("a tweet by {}", {"realDonaldTrump": "Donald Trump", "HillaryClinton": "Hillary Clinton"}),
    "books": ("an excerpt from a book for {}", {"adult": "adults"}),
    "opinions": ("a {} opinion", {}),
    "amazon": ("a {} product review", {}),
    "movies": ("a {} film review", {}),
    "editorials": ("a {} newspaper editorial", {}),
    "friends": ("{} from Friends is speaking", {}),
    "tweets": ("a {} tweet", {}),
    "conventions": ("a speech by a {}", {}),
    "films": ("{} of a film", {"plot": "the plot", "review": "a review"}),
}


def phrases(task: str, classes: Sequence[str]) -> list[str]:
    """A phrase for each class of a task. Raises KeyError for a task that has no template."""
    template, names = TEMPLATES[task]
    return [template.format(names.get(label, label.replace("-", " "))) for label in classes]
