"""Routes about the service itself: models, health, metrics, documentation."""

import prometheus_client
from fastapi import Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import RedirectResponse, Response
from fastapi.staticfiles import StaticFiles

from export.artifact import ModelCard
from serving.api.openapi import new_router
from serving.api.request import Ready, requested_encoder
from serving.api.response import json_response
from serving.errors import documented
from serving.protocol import replies

DOCS_ASSETS = "/docs/assets"

router = new_router()


@router.get("/v1/models", response_model=replies.Models, responses=documented())
async def models(request: Request) -> Response:
    """List the model cards of the encoders that are served, the default first."""
    engine = request.app.state.engine
    return json_response({"object": "list", "data": [_model(request, card) for card in engine.cards] if engine else []})


@router.get("/v1/models/{id}", response_model=replies.Model, responses=documented(404, 503))
async def model(request: Request, id: str, engine: Ready) -> Response:
    """Get the model card of one encoder."""
    return json_response(_model(request, engine.card_of(requested_encoder(id))))


def _model(request: Request, card: ModelCard) -> dict:
    shape = {"object": "model", "created": request.app.state.started, "owned_by": "twinview"}
    return {"id": card.id, **shape, **card.to_dict()}


@router.get("/livez", response_model=replies.Liveness)
async def livez() -> Response:
    """Check that the process responds, with or without an encoder."""
    return json_response({"status": "alive"})


@router.get("/readyz", response_model=replies.Readiness, responses=documented(503))
async def readyz(engine: Ready) -> Response:
    """Check that images can be embedded: the encoder is loaded, and has answered in the last seconds."""
    await engine.check()
    names = [card.id for card in engine.cards]
    facts = {"providers": engine.providers, "gpu_problem": engine.gpu_problem}
    return json_response({"status": "ready", "model": names[0], "models": names, **facts})


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **documented()},
)
async def metrics(request: Request) -> Response:
    """Get the metrics in Prometheus's text format."""
    return Response(request.app.state.metrics.text(), media_type=prometheus_client.CONTENT_TYPE_LATEST)


@router.get("/", include_in_schema=False)
async def start(request: Request) -> Response:
    """Redirect to the page, or to the documentation if this service has no page."""
    has_page = any(getattr(route, "path", None) == "/ui" for route in request.app.routes)
    return RedirectResponse(request.scope["root_path"] + ("/ui/" if has_page else "/docs"))


@router.get("/favicon.ico", include_in_schema=False)
async def icon(request: Request) -> Response:
    """Browsers ask for it on pages that name no icon, such as JSON."""
    return RedirectResponse(f"{request.scope['root_path']}{DOCS_ASSETS}/favicon-light-32x32.png")


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    below = request.scope["root_path"]
    return get_swagger_ui_html(
        openapi_url=below + request.app.openapi_url,
        title="Twinview",
        swagger_js_url=f"{below}{DOCS_ASSETS}/swagger-ui-bundle.js",
        swagger_css_url=f"{below}{DOCS_ASSETS}/swagger-ui.css",
        swagger_favicon_url=f"{below}{DOCS_ASSETS}/favicon-light-32x32.png",
    )


def docs_assets() -> StaticFiles:
    """BentoML's copy of Swagger UI. FastAPI's own page would load it from another site."""
    return StaticFiles(packages=[("bentoml", "_internal/server/static_content")])
