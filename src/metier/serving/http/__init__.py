"""OpenAI's API over a serving engine, by FastAPI."""
