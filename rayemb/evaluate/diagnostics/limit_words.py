"""What people are called and what they like, for `limit`.

Single words, no two of one stem: a lexical search finds them without fail, so that nothing but the capacity of a vector
is in question.
"""

_FIRST = """
Ada Agnes Alan Alice Amara Amir Andre Anita Anton Asha Astrid Barnaby Beatrice Bela Boris Bridget Bruno Carla Cecil
Celeste Chidi Clara Conrad Cora Cyrus Dagmar Dalia Damien Daria Desmond Diego Dora Edgar Edith Elena Elias Elsa Emeka
Enid Esther Ezra Farid Fatima Felix Fiona Flora Freya Gareth Gemma Gideon Greta Gunnar Gwen Hana Harriet Hector Helga
Hiroshi Hugo Ida Igor Imogen Ines Ingrid Isaac Ivana Jasper Joanna Jonas Judith Julian Kamal Karin Keiko Kofi Lars
Laura Leila Leon Lionel Lucia Lydia Mabel Magnus Malik Marcel Margot Matilda Mei Milo Miriam Nadia Naomi Nigel Nina
Noor Odette Olga Omar Oscar Otto Paloma Pedro Petra Philippa Quentin Rafael Ramona Ravi Rhoda Rosa Rufus Sadie Salma
Samir Selma Silas Simone Stella Sven Tamara Tariq Thea Tobias Ursula Vera Viktor Wanda Wilfred Xenia Yara Yusuf Zelda
"""

_LAST = """
Abbott Acheson Adeyemi Aldous Almeida Anand Arkwright Ashdown Barlow Bassett Becker Bellamy Bergman Bianchi Blakely
Boateng Bowen Brandt Calloway Campos Carver Castellan Chadwick Cho Clemens Corbett Dalgaard Danvers Delgado Dietrich
Draper Dufour Eberhart Eklund Ellery Engel Esposito Fairfax Farrow Ferreira Forsberg Fuentes Gallagher Garland Gibbs
Goldberg Grantham Gupta Hadley Halloran Hargreave Hartmann Hendry Holloway Ibarra Ingram Ivanov Jarvis Jensen Kapoor
Keating Kimura Kovacs Kruger Lambert Langley Larkin Lindqvist Lombardi Lovell Macrae Madaki Marchetti Marlowe Mehta
Mercer Moreau Nakamura Nash Novak Oakley Obi Okafor Olsen Ortega Palmer Paquette Pereira Petrov Pickering Quigley
Radcliffe Ramsey Renard Ricci Rosen Rutledge Salazar Sanderson Sato Schuster Selwyn Sharma Sinclair Sorensen Stanton
Strand Sutherland Tanaka Thackeray Thorne Tremblay Ueda Vasquez Verma Vogel Wakefield Whitlock Winslow Yamada Yates
Zabel Zielinski
"""

_LIKES = """
apples apricots artichokes asparagus avocados bagels bananas barley basil beetroots biscuits blackberries blueberries
brioche broccoli brownies burritos butter cabbages cakes capers cappuccinos caramel cardamom carrots cashews
cauliflower caviar celery cherries chestnuts chilli chips chives chocolate chutney cider cinnamon clams cloves cocoa
coconuts cod coffee coriander couscous crabs cranberries cream crepes croissants cucumbers cumin currants curry
custard dates dill doughnuts dumplings eels eggs elderflower espresso falafel fennel figs focaccia fondue fudge garlic
gazpacho ginger gnocchi gooseberries granola grapefruits grapes gravy guavas haddock halibut ham hazelnuts herring
honey horseradish hummus jam juniper kale kebabs ketchup kimchi kiwis kohlrabi lamb lasagne leeks lemonade lemons
lentils lettuce lime liquorice lobsters lychees macadamias mackerel mangoes marmalade marzipan mayonnaise melons
meringues milk millet mint molasses muesli muffins mushrooms mussels mustard nectarines noodles nougat nutmeg oatmeal
okra olives omelettes onions oranges oregano oysters paella pancakes papayas paprika parsley parsnips pasta pastries
peaches peanuts pears peas pecans peppers persimmons pesto pheasants pickles pies pineapples pistachios pizza plums
polenta pomegranates popcorn porridge potatoes prawns pretzels pumpkins quiches quinces radishes raisins ramen
raspberries ravioli rhubarb rice risotto rosemary saffron sage salami salmon salsa sardines sauerkraut sausages
scallops scones sesame shallots sherbet sorbet soups spaghetti spinach squid steaks stew strawberries sushi tacos
tahini tamarind tangerines tapioca tarragon tarts tea thyme tiramisu toffee tofu tomatoes truffles trout tuna turmeric
turnips vanilla vinegar waffles walnuts wasabi watercress watermelons yams yoghurt zucchini aardvarks albatrosses
alligators alpacas anacondas anchovies antelopes ants armadillos axolotls baboons badgers barnacles bats bears beavers
bees beetles bison blackbirds boars bobcats buffaloes bullfinches bumblebees butterflies buzzards camels canaries
capybaras caribou caterpillars catfish cats centipedes chameleons cheetahs chickens chimpanzees chinchillas chipmunks
cicadas cobras cockatoos condors corals cormorants coyotes cranes crickets crocodiles crows cuckoos deer dingoes dodos
dogs dolphins donkeys dragonflies ducks eagles earthworms echidnas egrets elephants elks emus falcons ferrets finches
fireflies flamingos flies foxes frogs gazelles geckos geese gerbils gibbons giraffes goats goldfish gorillas
grasshoppers grouse guppies hamsters hares hawks hedgehogs hens herons hippos hornets horses hummingbirds hyenas
ibises iguanas impalas jackals jaguars jays jellyfish kangaroos kestrels kingfishers koalas krill ladybirds lampreys
larks lemmings lemurs leopards lions lizards llamas locusts lynxes macaws magpies mallards manatees mandrills mantises
marlins marmots meerkats minnows moles mongooses monkeys moose moths mules narwhals newts nightingales ocelots
octopuses opossums orangutans orcas orioles ospreys ostriches otters owls oxen pandas pangolins panthers parakeets
parrots partridges peacocks pelicans penguins pigeons pigs piranhas platypuses plovers porcupines porpoises puffins
pumas pythons quails quokkas rabbits raccoons ravens reindeer rhinos robins roosters salamanders sandpipers scorpions
seagulls seahorses seals sharks sheep shrews skunks sloths slugs snails sparrows spiders sponges squirrels starfish
starlings stingrays stoats storks swallows swans tapirs tarantulas termites terns terriers thrushes tigers toads
tortoises toucans turkeys turtles urchins vultures wallabies walruses warblers wasps weasels whales wildebeest
wolverines wolves wombats woodpeckers wrens yaks zebras acacias alders amaryllis anemones aspens asters azaleas bamboo
banyans begonias birches bluebells bonsai bougainvillea bracken brambles buttercups cacti camellias carnations cedars
chrysanthemums clematis clover cornflowers crocuses cypresses daffodils dahlias daisies dandelions delphiniums elms
eucalyptus ferns firs forsythia foxgloves freesias fuchsias gardenias geraniums gladioli gorse hawthorn heather
hellebores hibiscus holly hollyhocks honeysuckle hyacinths hydrangeas irises ivy jasmine larches laurel lavender
lichen lilacs lilies lotuses lupins magnolias mahogany mangroves maples marigolds mimosas mistletoe moss myrtle
nasturtiums nettles oaks oleanders orchids palms pansies peonies petunias pines plane poplars poppies primroses
redwoods rhododendrons roses rowans sedges sequoias snapdragons snowdrops sunflowers sycamores teak thistles tulips
verbena violets willows wisteria yews zinnias accordions banjos bagpipes ballads bassoons bells blues bongos brass
bugles calypso cellos chants choirs clarinets concertos cymbals dirges drums duets euphoniums fanfares fiddles
flamenco flutes fugues funk glockenspiels gongs gospel grunge guitars harmonicas harps harpsichords hymns jazz jingles
kazoos keyboards lullabies lutes lyres madrigals mandolins maracas marches marimbas mazurkas nocturnes oboes ocarinas
operas oratorios organs overtures pianos piccolos polkas preludes punk quartets ragas ragtime rap recorders reggae
requiems rondos sambas saxophones serenades shanties sitars ska sonatas soul symphonies synthesizers tambourines
tangos techno theremins triangles trombones trumpets tubas ukuleles vibraphones violas violins waltzes whistling
xylophones yodelling zithers abseiling acrobatics aerobics aikido archery athletics badminton ballet baseball
basketball biathlons billiards bobsleigh bodyboarding bouldering bowling boxing bungee camping capoeira cheerleading
chess climbing croquet curling cycling darts decathlons diving dodgeball dominoes dressage falconry fencing fishing
football frisbees golf gymnastics handball hiking hockey hopscotch hurdles javelins jogging judo juggling kabaddi
karate kayaking kickboxing kites lacrosse luge marathons netball orienteering paddleboarding parachutes paragliding
parkour pentathlons petanque pilates polo pool rafting rallying rodeos rollerblading rounders rowing rugby running
sailing sculling skateboarding skating skiing skipping skittles sledging snorkelling snooker snowboarding softball
sprinting squash stretching sumo surfing swimming taekwondo tennis tobogganing trampolines triathlons volleyball
wakeboarding walking weightlifting windsurfing wrestling yachting yoga anoraks aprons ascots bandanas belts berets
bikinis blazers blouses bonnets boots bowties bracelets braces brooches buckles buttons cagoules capes caps cardigans
chinos cloaks clogs coats corduroy corsets cravats cufflinks denim dresses dungarees earmuffs earrings espadrilles
fedoras fezzes fleeces garters gloves gowns hats headbands hoodies jackets jeans jerseys jodhpurs jumpers kaftans
kilts kimonos lace leather leggings linen loafers mittens moccasins muslin necklaces overcoats pajamas parkas
pashminas pendants petticoats plimsolls pockets ponchos pullovers raincoats ribbons rings robes sandals saris sarongs
satin scarves shawls shirts shoes shorts silk skirts slippers sneakers socks sombreros spectacles stilettos stockings
suede suits sunglasses suspenders sweaters tartan ties tights togas trainers trousers tunics turbans tuxedos tweed
umbrellas uniforms veils velvet waistcoats wigs wool zips accountants actors architects astronauts bakers bankers
barbers barristers beekeepers biologists blacksmiths bookbinders botanists bricklayers butchers butlers carpenters
cartographers chefs chemists clowns cobblers comedians composers coopers curators dancers dentists detectives
diplomats electricians engineers explorers farmers firefighters florists gardeners geologists glaziers goldsmiths
grocers historians inventors jewellers jockeys journalists judges jugglers knights lawyers librarians lifeguards
locksmiths magicians mechanics milliners miners monks musicians nannies novelists nuns nurses opticians painters
pharmacists philosophers photographers physicists pilots pirates plumbers poets postmen potters professors programmers
puppeteers rangers referees roofers saddlers sailors scribes sculptors shepherds sheriffs shipwrights soldiers spies
stonemasons surgeons surveyors tailors teachers thatchers tinkers translators tutors undertakers upholsterers vets
vicars vintners waiters watchmakers weavers wheelwrights wizards zookeepers abacuses airships alarms anchors anvils
aquariums armchairs arrows axes balloons barometers barrels baskets bathtubs batteries beads beds benches bicycles
binoculars blankets bookcases books bottles bricks bridges brooms brushes buckets bulldozers bunting buses cabinets
calculators calendars cameras candles canoes canvases caravans carousels carpets carriages castles catapults
cathedrals chains chairs chalk chandeliers chariots chimneys chisels cinemas clocks coaches coins combs compasses
computers corkscrews cottages couches cradles crayons cribs crossbows crosswords crowns cupboards curtains cushions
desks diaries dice dictionaries doorbells doors drawers drills dynamos easels elevators encyclopedias envelopes
erasers escalators fans ferries files fireplaces fireworks flags flasks forks fountains frames funnels galleries gates
gears generators glaciers glasses globes glue gramophones greenhouses hammers hammocks handkerchiefs hatches haystacks
headphones helicopters helmets hinges hourglasses igloos inkwells jigsaws jugs kaleidoscopes kettles keys kilns knives
ladders ladles lamps lanterns lasers lathes lawnmowers lenses letters levers libraries lighthouses limousines lockets
locomotives looms magazines magnets mailboxes mallets mansions maps marbles matches mattresses medals megaphones
metronomes microphones microscopes mills mirrors mobiles monoliths mopeds mops mosaics motorcycles mugs murals museums
nails needles newspapers nutcrackers obelisks oars ovens padlocks pagodas paintbrushes palaces paperclips parasols
parchment pavilions pebbles pencils pendulums pens periscopes pewter phones pillows pipes pistons pitchforks
planetariums plates pliers ploughs polaroids porcelain postcards posters pottery pulleys pumps puzzles pyramids quills
quilts radiators radios railways refrigerators rickshaws robots rockets ropes rugs sandcastles satellites saucers saws
scaffolds scales scissors scooters screwdrivers scrolls sculptures seesaws shelves shovels shutters sickles sieves
signposts skyscrapers sofas spanners spades spoons springs stamps staplers statues steamboats stethoscopes stools
stopwatches stoves streetlights submarines sundials suitcases swings swords tables tablets tandems tankards tapestries
taxis teapots telegraphs telescopes televisions tents terracotta thermometers thermostats thimbles tiles toasters
tokens toolboxes torches towels towers tractors trains trams tricycles trolleys trophies trucks tunnels turbines
tweezers typewriters unicycles urns vases viaducts wagons wallets wallpaper watches wheelbarrows wheels windmills
windows wrenches zeppelins algebra alchemy anthropology archaeology astrology astronomy bingo biology botany bouquets
calculus calligraphy caricatures ceramics chemistry choreography collages comics conjuring cosmology crochet
cryptography debates ecology economics embroidery engraving entomology equations essays ethics etymology fables
fairytales folklore fractals genealogy genetics geography geology geometry graffiti grammar haiku heraldry history
horoscopes improvisation jokes journalism juggernauts knitting landscapes law legends limericks linguistics literature
logarithms logic macrame magic mathematics maxims medicine memoirs metaphors meteorology mime mysteries mythology
needlework neuroscience novels numismatics oceanography origami ornithology palaeontology palindromes pantomimes
paradoxes parodies patchwork pathology philately philosophy phonetics photography physics picnics plays poetry
politics portraits prose proverbs psychology puns quizzes raffles rhetoric rhymes riddles sagas satire semaphore
semiotics silhouettes sketches sociology sonnets spelling statistics storytelling surrealism tattoos taxidermy theatre
theology theorems tragedies topology trigonometry typography ventriloquism volcanology watercolours welding whittling
zoology auroras avalanches beaches bogs breezes canyons cascades caves cliffs clouds comets craters creeks deltas
deserts dew dunes dusk eclipses estuaries farms fjords floods fog forests frost galaxies geysers glades gorges groves
gullies gusts hail harbours hedges hills hurricanes icebergs islands isthmuses jungles lagoons lakes lava lightning
marshes meadows meteors mist monsoons moonlight moors mountains mud nebulae oases oceans orchards peat peninsulas
planets plateaus ponds prairies puddles pulsars quarries quasars rain rainbows rapids ravines reefs rivers sand
savannas shadows shoals sleet snow solstices springtime stalactites stars steppes storms streams summits sunrises
sunsets swamps thunder tides tornadoes tundra twilight valleys vineyards volcanoes waterfalls waves whirlpools wind
winter woodlands agate alabaster amber amethysts aquamarine basalt bronze chrome cobalt copper crystals diamonds ebony
emeralds enamel flint garnets gold granite graphite iron jade lapis limestone malachite mercury nickel obsidian onyx
opals pearls peridot platinum pumice pyrite quartz rubies sapphires shale silver slate steel sulphur tin titanium
topaz tourmaline turquoise uranium zinc zircon
"""

_KINDS = """
antique borrowed bright broken carved Celtic cheap Danish distant elegant faded famous foreign gigantic gleaming
handmade hidden Japanese local lucky miniature modern odd ornate painted perfect plain rare rustic Scottish seasonal
secret spare striped tiny traditional Tuscan unusual vintage wild
"""

FIRST, LAST, LIKES = tuple(_FIRST.split()), tuple(_LAST.split()), tuple(_LIKES.split())
KINDS = tuple(_KINDS.split())
"""Make more things to like of one: "rare kites". Their words are shared, so they are for when `LIKES` run out."""
