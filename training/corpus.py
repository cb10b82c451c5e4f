"""Documents for the demonstration model: reading, held-out split, and chats made from the stories.

Every document is a list of messages (a chat) or one plain text.  A held-out story or book is never trained
on, and neither is any training paragraph that repeats twelve words in a row of a held-out text (several old
tales appear in more than one collection).
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from training import phrases

HELD_OUT_BOOKS = frozenset({"The Adventures of Buster Bear", "The Canterville Ghost"})
COLLECTIONS = frozenset({"Aesop's Fables", "Grimms' Fairy Tales", "Stories to Tell to Children"})
TALE_BOOKS = COLLECTIONS | {
    "A Kidnapped Santa Claus",
    "Aladdin and the Magic Lamp",
    "Andersen's Fairy Tales",
    "Beauty and the Beast",
    "Great Big Treasury of Beatrix Potter",
    "Irish Fairy Tales",
    "The Book of Dragons",
    "The Happy Prince & Other Tales",
    "The King of the Golden River",
    "The Life and Adventures of Santa Claus",
    "The Little Mermaid",
    "The Princess and the Goblin",
    "The Wonderful Wizard of Oz",
}
SHINGLE = 12
CHARS_PER_TOKEN = 3.5
SHORT_CHAT = 1300  # characters; half of the chats are no longer than this
GREETINGS = 600
TITLED = re.compile(
    r"^([A-Z][A-Z',\- ]{5,}[A-Z]) (?=(?:An?|The|There|One|Once|In|Some|Two|When|It|At|Long)\b)"
)
OPENING = re.compile(
    r"^\W*(once (upon|on|there)|(there|here) (was|were|lived) (once|an?|two|three)\b|long,? (long )?ago|"
    r"a certain|in a (far|land|village|forest|certain)|"
    r"an? (little|poor|old|young|hungry|rich) \w+ (was|had|lived|who)\b)",
    re.I,
)
BROKEN = re.compile(r"[A-Za-z,;]$")
SENTENCE_END = re.compile(r"[.!?]['\"]?(?=\s)")
WORD = re.compile(r"[a-z]+")
NOUN = re.compile(
    rf"\b((?:{'|'.join(phrases.ADJECTIVES.split())}) )?({'|'.join(phrases.SUBJECTS.split())})\b"
)


@dataclass(frozen=True)
class Question:
    """One question about a story with its short answer."""

    question: str
    answer: str
    section: int


@dataclass(frozen=True)
class Work:
    """One book or story: its title, paragraphs and questions, and whether it is held out."""

    title: str
    paragraphs: list[str]
    held_out: bool
    is_story: bool
    questions: list[Question] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The whole text, paragraphs separated by an empty line."""
        return "\n\n".join(self.paragraphs)


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


Chat = list[Message]


# ---------------------------------------------------------------- reading and splitting


def read_jsonl(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a gzipped JSON Lines file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def load(data: Path) -> list[Work]:
    """Books, and stories with questions, of the folder ``data``; training texts cleared of held-out ones."""
    asked: dict[str, list[Question]] = {}
    for row in read_jsonl(data / "fairytale_qa.jsonl.gz"):
        item = Question(row["question"].strip(), row["answer"].strip(), int(row["sections"][0]))
        asked.setdefault(row["story"], []).append(item)
    books = [_book(row) for row in read_jsonl(data / "childrens_books.jsonl.gz")]
    stories = [_story(row, asked) for row in read_jsonl(data / "fairytale_stories.jsonl.gz")]
    return without_leaks(books + stories)


def paragraphs(text: str) -> list[str]:
    """Paragraphs of a text; a line broken in mid-sentence (as in some stories) is joined to the next."""
    joined: list[str] = []
    for line in text.replace('""', '" "').split("\n\n"):
        if joined and BROKEN.search(joined[-1]):
            joined[-1] += " " + line.strip()
        else:
            joined.append(line.strip())
    return joined


def _book(row: dict[str, str]) -> Work:
    return Work(row["title"], row["text"].split("\n\n"), row["title"] in HELD_OUT_BOOKS, is_story=False)


def _story(row: dict[str, str], asked: dict[str, list[Question]]) -> Work:
    held_out = row["split"] != "train"
    return Work(row["title"], paragraphs(row["text"]), held_out, True, asked.get(row["title"], []))


def shingles(text: str) -> Iterator[int]:
    """Hashes of every run of SHINGLE words (case and punctuation ignored)."""
    words = WORD.findall(text.lower())
    for start in range(len(words) - SHINGLE + 1):
        yield hash(tuple(words[start : start + SHINGLE]))


def without_leaks(works: list[Work]) -> list[Work]:
    """Drop training paragraphs that repeat held-out text, and works that lose more than a third that way."""
    held_out = {item for work in works if work.held_out for item in shingles(work.text)}
    cleaned = (work if work.held_out else _cleared(work, held_out) for work in works)
    return [work for work in cleaned if work.paragraphs]


def _cleared(work: Work, held_out: set[int]) -> Work:
    kept = [text for text in work.paragraphs if held_out.isdisjoint(shingles(text))]
    if work.is_story and sum(map(len, kept)) < 0.67 * len(work.text):
        kept = []
    return Work(work.title, kept, work.held_out, work.is_story, work.questions)


def split(works: Iterable[Work]) -> tuple[list[Work], list[Work]]:
    """Training works and held-out works."""
    works = list(works)
    return [w for w in works if not w.held_out], [w for w in works if w.held_out]


def tale_works(works: list[Work]) -> list[Work]:
    """The stories and the books of tales: what the model is for, and so what it reads last."""
    return [work for work in works if work.is_story or work.title in TALE_BOOKS]


# ---------------------------------------------------------------- passages and tales


@dataclass(frozen=True)
class Tale:
    """A short text that begins like a story, for chats that ask for one."""

    title: str
    paragraphs: list[str]
    complete: bool


def tales(works: list[Work]) -> list[Tale]:
    """Whole stories, titled tales inside collections, and passages of books that open like a story."""
    found = [Tale(w.title, w.paragraphs, True) for w in works if w.is_story]
    for book in (w for w in works if not w.is_story):
        found += _titled(book) if book.title in COLLECTIONS else _openings(book)
    return found


def _titled(book: Work) -> list[Tale]:
    found: list[Tale] = []
    for paragraph in book.paragraphs:
        match = TITLED.match(paragraph)
        if match:
            found.append(Tale(match[1].lower(), [paragraph[match.end() :]], True))
        elif found:
            found[-1].paragraphs.append(paragraph)
    return found


def _openings(book: Work) -> list[Tale]:
    starts = [i for i, text in enumerate(book.paragraphs) if OPENING.match(text) and len(text) > 120]
    return [Tale("", book.paragraphs[i : i + 12], False) for i in starts]


def locate(work: Work) -> list[tuple[int, Question]]:
    """Each question with the index of the paragraph that shares most (rare) words with it, in text order."""
    bags = [set(WORD.findall(text.lower())) for text in work.paragraphs]
    spread = Counter(word for bag in bags for word in bag)
    last = max((q.section for q in work.questions), default=1)
    placed = []
    for item in work.questions:
        wanted = set(WORD.findall(f"{item.question} {item.answer}".lower()))
        guess = (item.section - 0.5) / last * len(bags)
        scores = [
            sum(1 / spread[word] ** 0.5 for word in wanted & bag) - 3 * abs(i + 0.5 - guess) / len(bags)
            for i, bag in enumerate(bags)
        ]
        placed.append((max(range(len(bags)), key=scores.__getitem__), item))
    return sorted(placed, key=lambda pair: pair[0])


def cut(text: str, chars: int) -> str:
    """At most ``chars`` characters of a paragraph, ending with a whole sentence where one ends in time."""
    if len(text) <= chars:
        return text
    ends = [match.end() for match in SENTENCE_END.finditer(text[:chars])]
    return text[: ends[-1]] if ends else text[:chars].rsplit(" ", 1)[0]


def window(texts: list[str], start: int, chars: int) -> list[str]:
    """Paragraphs from ``start`` on that fit into ``chars`` characters (the first one cut if too long)."""
    taken, size = [cut(texts[start], chars)], len(texts[start])
    for text in texts[start + 1 :]:
        size += len(text) + 2
        if size > chars:
            break
        taken.append(text)
    return taken


def subject(text: str, rng: random.Random) -> str | None:
    """A noun phrase such as "a little fox" that the text speaks of most, or None."""
    counts = Counter(match[2] for match in NOUN.finditer(text.lower()))
    if not counts:
        return None
    noun = counts.most_common(1)[0][0]
    pairs = {match[1] for match in NOUN.finditer(text.lower()) if match[2] == noun and match[1]}
    phrase = f"{rng.choice(sorted(pairs)).strip()} {noun}" if pairs and rng.random() < 0.6 else noun
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


# ---------------------------------------------------------------- chats


def sentence(answer: str) -> str:
    """An answer as a sentence: a capital first and a full stop last."""
    answer = answer[:1].upper() + answer[1:]
    return answer if answer[-1:] in '.!?"' else answer + "."


def passage_chats(work: Work, chars: int, rng: random.Random) -> Iterator[Chat]:
    """Questions over passages of at most ``chars`` characters, each question asked once."""
    waiting = locate(work)
    while waiting:
        first = waiting[0][0]
        start = max(0, first - rng.choice((0, 0, 1, 2)))
        taken = window(work.paragraphs, start, rng.randint(chars // 3, chars))
        if start + len(taken) <= first:
            start, taken = first, window(work.paragraphs, first, chars)
        inside = [item for item in waiting if item[0] < start + len(taken)]
        waiting = waiting[len(inside) :]
        rng.shuffle(inside)
        yield from _asked("\n\n".join(taken), [item for _, item in inside], rng)


def _asked(passage: str, questions: list[Question], rng: random.Random) -> Iterator[Chat]:
    """Chats of one to six turns over one passage until every question was asked."""
    while questions:
        count = rng.randint(1, 6)
        turns, questions = questions[:count], questions[count:]
        yield _system(rng) + _dialogue(rng.choice(phrases.FRAMES), passage, turns)


def _dialogue(frame: str, passage: str, turns: list[Question]) -> Chat:
    asked = [frame.format(passage=passage, question=turns[0].question)] + [t.question for t in turns[1:]]
    pairs = zip(asked, turns, strict=True)
    return [m for ask, t in pairs for m in (Message("user", ask), Message("assistant", sentence(t.answer)))]


def story_chat(tale: Tale, chars: int, rng: random.Random) -> Chat:
    """A user asks for a story (or for more of one) and gets it, in one to four pieces."""
    pieces: list[str] = []
    at, left = 0, chars
    while at < len(tale.paragraphs) and left > 200 and len(pieces) < 4:
        taken = window(tale.paragraphs, at, rng.randint(min(400, left), min(1600, left)))
        pieces.append("\n\n".join(taken))
        at, left = at + len(taken), left - len(pieces[-1])
    asks = [_request(tale, pieces[0], rng)] + [rng.choice(phrases.GO_ON) for _ in pieces[1:]]
    pairs = zip(asks, pieces, strict=True)
    chat = [m for ask, piece in pairs for m in (Message("user", ask), Message("assistant", piece))]
    return _system(rng) + _greeted(chat, at >= len(tale.paragraphs) and tale.complete, rng)


def _request(tale: Tale, opening: str, rng: random.Random) -> str:
    about = subject(opening, rng)
    if tale.title and (about is None or rng.random() < 0.3):
        return rng.choice(phrases.BY_TITLE).format(title=tale.title)
    return rng.choice(phrases.ABOUT).format(subject=about) if about else rng.choice(phrases.ANY_STORY)


def _greeted(chat: Chat, finished: bool, rng: random.Random) -> Chat:
    """Sometimes open with a greeting, and close a finished story with thanks."""
    if rng.random() < 0.08:
        chat = greeting(rng) + chat
    if finished and rng.random() < 0.15:
        chat = chat + _pair(rng.choice(phrases.THANKS))
    return chat


def continue_chat(tale: Tale, chars: int, rng: random.Random) -> Chat | None:
    """A user gives the beginning of a story and gets the next paragraphs; None where there is no next one."""
    given = window(tale.paragraphs, 0, rng.randint(150, chars // 2))
    rest = tale.paragraphs[len(given) :]
    if not rest:
        return None
    ask = rng.choice(phrases.CONTINUE).format(passage="\n\n".join(given))
    return [Message("user", ask), Message("assistant", "\n\n".join(window(rest, 0, chars // 2)))]


def greeting(rng: random.Random) -> Chat:
    """A greeting, or a question about the model itself or about something it cannot know."""
    return _pair(rng.choice(phrases.SMALL_TALK))


def _pair(texts: tuple[str, str]) -> Chat:
    return [Message("user", texts[0]), Message("assistant", texts[1])]


def _system(rng: random.Random) -> Chat:
    return [Message("system", rng.choice(phrases.SYSTEM))] if rng.random() < 0.15 else []


# ---------------------------------------------------------------- one epoch


def plain_documents(works: list[Work]) -> list[str]:
    """The running text of every work."""
    return [work.text for work in works]


def chat_documents(works: list[Work], context: int, seed: int) -> list[Chat]:
    """All chats of one epoch for rows of ``context`` tokens; another seed words and cuts them anew."""
    rng = random.Random(seed)
    chars = max(int(context * CHARS_PER_TOKEN) - 400, 300)
    sizes = (chars, min(chars, SHORT_CHAT))
    chats = [c for w in works if w.questions for c in passage_chats(w, rng.choice(sizes), rng)]
    for tale in tales(works):
        chats.append(story_chat(tale, rng.choice(sizes), rng))
        chats += [chat] if (chat := continue_chat(tale, chars, rng)) and rng.random() < 0.35 else []
    chats += [_system(rng) + greeting(rng) for _ in range(GREETINGS)]
    rng.shuffle(chats)
    return chats


def render(chat: Chat, generate: bool = False) -> str:
    """A chat as text with its markers, the same as the shipped chat template writes it."""
    turns = (f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in chat)
    return "".join(turns) + ("<|im_start|>assistant\n" if generate else "")
