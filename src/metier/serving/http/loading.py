"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, in vLLM's form, so that its operators work here."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from fastapi import FastAPI
from starlette.responses import PlainTextResponse, Response

from metier.errors import UnknownDeltaError
from metier.serving.http.errors import ApiError
from metier.serving.http.fields import CheckedModel
from metier.serving.http.front import Front
from metier.serving.places import allowed_folder, check_name


class LoadRequest(CheckedModel):
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"load_inplace": (False,)}

    lora_name: str
    lora_path: str
    pinned: bool = False
    """Keep it on the accelerator whatever else is asked for."""


class UnloadRequest(CheckedModel):
    harmless: ClassVar[frozenset[str]] = frozenset({"lora_int_id"})

    lora_name: str


def add_loading(app: FastAPI, front: Front) -> None:
    def check_allowed() -> None:
        if not front.settings.allows_loading:
            raise ApiError(
                403,
                "This server does not let requests load or unload deltas. Start it with --allow-loading if it should.",
                kind="permission_error",
                code="loading_not_allowed",
            )

    @app.post("/v1/load_lora_adapter")
    async def load(asked: LoadRequest) -> Response:
        check_allowed()
        check_name(asked.lora_name, front.base_name)
        folder = await asyncio.to_thread(allowed_folder, asked.lora_path, front.settings.delta_dirs)
        await front.engine.load_delta(asked.lora_name, folder, is_pinned=asked.pinned)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload(asked: UnloadRequest) -> Response:
        check_allowed()
        try:
            await front.engine.unload_delta(asked.lora_name)
        except UnknownDeltaError as error:
            raise ApiError(404, str(error), param="lora_name", code="model_not_found") from error
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")
