"""The words of Saltmere, an invented group of islands: every list that the generator draws from.

Names are invented; a word belongs to one list only, so an answer's kind can be told from the answer.
"""

GIVEN = """Ada Alden Anka Bram Brisa Cael Cora Dain Della Edda Egan Elin Falk Fenna Gale Greta Hale Hedy Ilsa Ivor
Jana Joren Kaya Kell Lars Lena Lorn Mabel Marek Mira Nell Nils Odo Oren Orla Pell Petra Quill Rhea Rook Runa Sable
Senna Sorrel Tamsin Tarn Thea Tove Ulf Una Vale Vera Wade Wren Yara Yule Zane Zora Bette Corin Ferris Hob Isolde
Linnet""".split()

SURNAME = """Abbot Ashby Barrow Beck Birch Blythe Brack Brand Calder Carrow Cobb Crane Dace Darrow Drake Dunn Ember
Fable Farrow Finch Flint Frost Garrick Gorse Grove Hask Hawke Heath Holt Hurst Jessop Keel Kestrel Lark Locke Lowe
Marsh Merrow Moss Nash Oake Orchard Penrose Pike Poole Quarry Rudd Sallow Selby Shale Skerry Slate Stroud Tallow
Thorn Tolen Varley Vane Wick Wilder Winter Yarrow York Zeal""".split()

TOWNS = """Aldmoor Ambry Arkle Ashport Bellhaven Brask Calby Cinder Corrow Deepwell Drift Dunmar Eastrey Elmford
Fallow Farhold Garth Glimmer Greyholm Hallow Harrowby Highcross Irongate Kelda Kingsey Lantern Longsand Marrow
Millrace Netherby Norwick Olmstead Oxley Pendle Quayside Ravensea Redcliff Rowan Saltby Seldon Sternhill Stillwater
Tidemark Underhill Vesper Westrey Whitby Windle""".split()

ISLANDS = "Anvil Cormorant Gannet Harbinger Meridian Pilgrim Sentinel Tempest".split()

TRADES = """baker barber binder brewer carter chandler clerk cobbler cooper dyer farrier ferryman fuller glazier
glover grocer hatter herbalist mason miller miner painter piper potter roper saddler sawyer smith tailor tanner
thatcher weaver""".split()

ANIMALS = """badger bat crow dog duck ferret fox frog goat goose hare hen heron horse jay lamb lizard magpie mole
mouse newt otter owl pig pigeon rabbit rat raven snail swan toad weasel""".split()

GOODS = """amber barley beeswax brass butter candles canvas chalk cheese cider clay coal copper cork cotton feathers
flax flour fur glass honey hops iron ivory lace lead leather linen malt oats oil paper pearls pepper pitch rope rye
salt sand silk silver soap spice steel sugar tar tea tiles timber tin tobacco wax wheat wine wool yarn""".split()

ITEMS = """anchor axe barrel basket bell blanket book boot bottle bowl box broom brush bucket button chair chest
clock coat comb cup drum fork hammer hat helmet hook jug kettle key knife ladder lamp lock map mirror nail needle
oar pan pen pipe plate quilt ring sack saw scarf shovel spoon stool sword table tent thimble trunk vase wheel
whistle""".split()

REMEDY_KINDS = "bitter black blue dry green pale red sweet white wild winter yellow".split()
REMEDY_PLANTS = "balm clover fennel hemlock hyssop mallow nettle poppy sage tansy thyme valerian".split()
AILMENTS = """ague asthma boils burns chills colic cough cramp croup dropsy fever gout headache hiccups itch jaundice
measles nausea palsy rash scurvy sprain toothache vertigo""".split()
HOURS = "dawn noon dusk midnight".split()

WEATHER = "bright calm cold dark foggy frosty grey mild rainy stormy warm windy".split()
MOODS = "angry bold eager gentle glad lonely patient proud quiet sly tired weary".split()
FOODS = """apples beans bread cabbage carrots cream eggs fish garlic leeks lentils milk mushrooms mustard onions
parsley pears peas plums turnips vinegar yeast""".split()
