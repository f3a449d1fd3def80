"""The server's application: a serving engine under OpenAI's API.

```
gate.py                                host, key, body's size, room; no error gets past it
chat_request.py, completion_request.py every field is used, without effect, or refused by name
service.py                             prompts are encoded and submitted to the engine
answers.py                             the text of each token, of all answers of the request
answering.py                           a stream of events or a whole answer, in the words of a shape: chat or completion
```
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from metier.serving.contract import ServingEngine
from metier.serving.detokenize import Tokenizer
from metier.serving.http.errors import install_error_handlers
from metier.serving.http.gate import Gate
from metier.serving.http.generating import add_generating
from metier.serving.http.loading import add_loading
from metier.serving.http.models import add_models
from metier.serving.http.page import add_page
from metier.serving.http.service import Service
from metier.serving.http.settings import HttpSettings
from metier.serving.http.watching import add_health, add_metrics
from metier.serving.together import Together


def create_app(engine: ServingEngine, tokenizer: Tokenizer, base_name: str, settings: HttpSettings) -> FastAPI:
    """An application that answers by `engine`, and closes it when it is shut down.

    Args:
        engine: called from the event loop's thread alone.
        tokenizer: the base's, of transformers.
        base_name: the `model` of requests to the base itself.
        settings: what clients may do.

    Returns:
        an application; its `state.service` can be told to close beforehand.
    """
    service = Service(engine, tokenizer, base_name, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    # no pages about the API: they would load scripts from elsewhere
    app = FastAPI(title="metier", lifespan=lifespan, openapi_url=None)
    app.state.service = service
    app.add_middleware(Gate, front=service)
    # outermost: the requests that it makes of one have to pass the gate
    app.add_middleware(Together)
    install_error_handlers(app)
    add_generating(app, service)
    add_models(app, service)
    add_loading(app, service)
    add_health(app, service)
    add_metrics(app, service.metrics)
    add_page(app)
    return app
