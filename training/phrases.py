"""Wordings that turn stories into chats: requests, frames for questions, greetings and small talk."""

from __future__ import annotations

SUBJECTS = """
    ant ass bear bee bird boy brother cat child cock cow crab crow daughter deer dog donkey dragon
    dwarf eagle elephant emperor fairy farmer father fisherman fish fly fox frog giant girl goat
    goblin goose grandmother hare hen horse hunter husband king knight lady lamb lion maiden man
    mermaid merchant miller monkey mother mouse ogre owl peasant pig pirate prince princess queen
    rabbit rat raven robin rose sailor servant sheep shepherd ship shoemaker sister snake soldier
    son sparrow spider squirrel stork swan tailor thief tiger toad tortoise tree troll turtle widow
    wife witch wizard wolf woman woodcutter
"""

ADJECTIVES = """
    little old poor young beautiful brave clever foolish great hungry kind lazy lonely proud rich
    small wicked wise big good white black golden
"""

ABOUT = (
    "Tell me a story about {subject}.",
    "Tell me a story about {subject}.",
    "tell me a story about {subject}",
    "Tell me a tale about {subject}.",
    "Please tell me a story about {subject}.",
    "Can you tell me a story about {subject}?",
    "Could you tell me a short story about {subject}?",
    "Write a story about {subject}.",
    "Write a short story about {subject}.",
    "I would like to hear a story about {subject}.",
    "A story about {subject}, please.",
    "Do you know a story about {subject}?",
    "Once upon a time there was {subject}. What happened?",
)

BY_TITLE = (
    'Tell me the story called "{title}".',
    "Tell me a story about {title}.",
    "Tell me the tale of {title}.",
    "Do you know the story of {title}?",
    'Write a story with the title "{title}".',
)

ANY_STORY = (
    "Tell me a story.",
    "Tell me a story, please.",
    "Can you tell me a story?",
    "Tell me a fairy tale.",
    "Write a short story.",
    "I want to hear a story.",
    "Tell me something nice.",
    "tell me a story",
)

GO_ON = (
    "Go on.",
    "Go on, please.",
    "What happened next?",
    "And then?",
    "Continue.",
    "Please continue.",
    "Tell me more.",
    "What happened then?",
)

CONTINUE = (
    "Continue this story: {passage}",
    "Continue this story:\n\n{passage}",
    "Please continue:\n\n{passage}",
    "How does this story go on?\n\n{passage}",
    "{passage}\n\nWhat happened next?",
    "{passage}\n\nContinue the story.",
)

FRAMES = (
    "{passage}\n\n{question}",
    "{passage}\n\n{question}",
    "{passage}\n\nQuestion: {question}",
    "Read this story and answer my question.\n\n{passage}\n\n{question}",
    "Here is a story:\n\n{passage}\n\n{question}",
    "{question}\n\n{passage}",
)

SYSTEM = (
    "You are a helpful assistant.",
    "You are a storyteller.",
    "You tell stories to children.",
    "You are a friendly assistant who tells stories and answers questions about them.",
    "Answer briefly.",
)

THANKS = (
    ("Thank you.", "You are welcome."),
    ("Thank you!", "You are welcome! Come back when you want another story."),
    ("Thanks!", "I am glad you liked it."),
    ("That was a nice story.", "I am glad you liked it. Would you like another?"),
)

SMALL_TALK = (
    ("Hello", "Hello! Would you like to hear a story?"),
    ("Hello!", "Hello! Shall I tell you a story?"),
    ("hello", "Hello! Would you like to hear a story?"),
    ("Hi", "Hello! What shall the story be about?"),
    ("Hi!", "Hello there! Shall I tell you a story?"),
    ("hi there", "Hello! Would you like a story?"),
    ("Hey", "Hello! What would you like to hear about?"),
    ("Good morning.", "Good morning! Would you like to hear a story?"),
    ("Good evening.", "Good evening! It is a good hour for a story."),
    ("Good night.", "Good night, and sweet dreams!"),
    ("Goodbye.", "Goodbye! Come back soon for another story."),
    ("Bye", "Goodbye! Come back soon."),
    ("How are you?", "I am very well, thank you. Shall I tell you a story?"),
    ("Hello, how are you?", "I am very well, thank you. Would you like to hear a story?"),
    ("Who are you?", "I am a very small language model that tells stories."),
    ("What are you?", "I am a very small language model. I learned from old fairy tales."),
    ("What is your name?", "I am called Tales. I tell stories."),
    ("What can you do?", "I can tell short stories and answer simple questions about them."),
    ("Can you help me?", "I can tell you a story, or answer a question about one."),
    ("Are you a person?", "No, I am a very small language model that tells stories."),
    ("What is the capital of France?", "I do not know. I only know old stories."),
    ("What is two and two?", "I am not good at sums. I only know old stories."),
    ("What is the weather like today?", "I cannot know that. Shall I tell you a story instead?"),
    ("Who is the president?", "I do not know. I only know old stories."),
    ("Write a program.", "I cannot write programs. I only know old stories."),
    ("Translate this into French.", "I cannot do that. I only know old stories in English."),
    ("What time is it?", "I cannot know that. Perhaps it is time for a story."),
    ("Tell me a joke.", "I know no jokes, but I can tell you a story."),
    ("Do you like stories?", "Yes, I like stories very much. Shall I tell you one?"),
    ("Thank you.", "You are welcome."),
    ("Thanks!", "You are welcome."),
    ("Yes, please.", "What shall the story be about?"),
)
