"""Ordinary text that chunks are computed after, see :mod:`ragcache.planning.context`."""

from __future__ import annotations

#: Texts about unlike things, as the chunks of a prompt are. All names are made up.
PROSE = (
    "The Aune\n\n"
    "The Aune is a river in the hills east of Marrow. It rises at about 900 metres, runs west "
    "through three narrow lakes, and reaches the sea at Port Lunde after 212 kilometres. Ice "
    "closes the upper valley from November to March. Barges carried slate and timber on the "
    "lower river until the railway opened in 1871, and since then it has mostly been used for "
    "fishing. A dam near Hollin supplies two towns with water.",
    "Clara Whitcombe\n\n"
    "Clara Whitcombe (3 May 1884 - 19 October 1961) was an English botanist and teacher. She "
    "grew up in Norwich as the second of five children, studied in Edinburgh, and joined an "
    "expedition to the Andes in 1911, from which she brought back more than four hundred "
    "plants. Her book on mosses was used in schools for decades. She married the engineer Paul "
    "Render in 1920, and they had one daughter, who became a judge.",
    "Night Train to Varna\n\n"
    "Night Train to Varna is a 1957 film directed by Emil Saddler, with Rosa Linden and Peter "
    "Oake in the main roles. It tells the story of two strangers who share a compartment and "
    "discover that both are running from the same man. The film was shot in nine weeks, mostly "
    "in a studio. Critics praised its dialogue, it won two awards, and a remake was released in "
    "1983.",
    "Bread\n\n"
    "To make a simple loaf, mix 500 grams of flour with 350 grams of water, a little yeast and "
    "ten grams of salt. Let the dough rest for an hour, fold it twice, and leave it in a cool "
    "place overnight. Heat the oven well before you bake it. The crust should sound hollow when "
    "you knock on it. If it is too pale, give it five more minutes.",
    "Harbour United\n\n"
    "Harbour United is a football club from Seaforth, founded in 1903 by dock workers. The team "
    "plays in blue and white at Mill Road, which has 14,200 seats. It won the cup in 1926 and "
    "again in 1974, when its captain, Joe Tarrant, scored twice in the last ten minutes. After "
    "years in the second division, it was promoted in 2009 under its first foreign coach, and "
    "bought by a group of supporters.",
    "How to return a parcel\n\n"
    "You can send back an order within thirty days. Print the label from your account, put the "
    "goods into their original box, and bring it to any of our shops. We refund the price as "
    "soon as it has arrived, usually within a week. If something was damaged, please take a "
    "picture first and write to us, so that we can find out what happened. This does not apply "
    "to gift cards.",
    "Glass frogs\n\n"
    "Glass frogs are small amphibians of the forests of Central and South America. The skin of "
    "their bellies is so clear that the heart and the liver can be seen. They live in trees "
    "along streams and lay their eggs on leaves above the water; the males of many species "
    "guard them. When they sleep, most of their blood is kept in the liver, which makes them "
    "harder to see.",
    "Minutes of the council\n\n"
    "The meeting was opened at 7 p.m. by the chair, Mrs Okafor. Mr Bell reported that repairs "
    "of the bridge would cost 40,000 more than planned, because the supports are older than the "
    "drawings say. After a short debate, the council agreed to close it to lorries from June. "
    "It also decided to plant trees along the High Street, and asked the library to open on "
    "Sundays. The next meeting is on the 12th.",
)
