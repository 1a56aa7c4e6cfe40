"""The viewer's server: one page, its data, and who may ask for them.

It listens on the loopback address alone. A browser lets any page send requests to it, so each must carry the
server's own Host (against DNS rebinding), and one that changes something its own Origin (against forged requests).
No response allows another origin to read it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
import tempfile
import threading
import webbrowser
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bsafusion.about import NOT_CLINICAL, version_of
from bsafusion.image import TASKS, Image, ImageError
from bsafusion.pipeline import check_device, read_input
from bsafusion.refinement import MOST_STEPS
from bsafusion.request import AUTO, CHOICES, FuseOptions, RequestError
from bsafusion.viewer.jobs import Busy, Jobs
from bsafusion.viewer.results import Library, files_of, thumbnail, told, zip_of
from bsafusion.weights import DEFAULT, find

Role = Literal["fixed", "moving"]
LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 8765
STATIC = Path(__file__).parent / "static"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class ViewerCfg:
    """What the viewer shows and how much it takes.

    Attributes:
        roots: result folders and folders of result folders that may be opened.
        weights, device: as for ``load_model``.
        largest_upload: bytes of one image file; nothing larger is stored, let alone decoded.
        inputs_kept: decoded images kept in memory.
    """

    roots: tuple[Path, ...] = ()
    weights: str = DEFAULT
    device: str = "cpu"
    largest_upload: int = 256 * 2**20
    inputs_kept: int = 4

    def __post_init__(self) -> None:
        if self.largest_upload < 1 or self.inputs_kept < 2:
            raise ValueError(
                f"largest_upload {self.largest_upload}, inputs_kept {self.inputs_kept}; expected at least 1 and 2"
            )


class Guard:
    """Turns away whoever is not the page itself, and puts :data:`HEADERS` on every answer."""

    def __init__(self, app: ASGIApp, port: int) -> None:
        self._app = app
        self._hosts = {f"{LOOPBACK}:{port}", f"localhost:{port}"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                ours = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *ours]
            await send(message)

        complaint = self._complaint(scope)
        answer = self._app if complaint is None else _error(403, complaint)
        await answer(scope, receive, send_guarded)

    def _complaint(self, scope: Scope) -> str | None:
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        host, origin = headers.get("host", []), headers.get("origin", [])
        if len(host) != 1 or host[0].lower() not in self._hosts:
            return "wrong Host; this viewer answers only to its own loopback address and port"
        reads = scope["method"] in ("GET", "HEAD")
        if (origin or not reads) and origin != [f"http://{host[0].lower()}"]:
            return "wrong or missing Origin; only the viewer's own page may call it"
        if headers.get("sec-fetch-site", ["none"])[0] not in ("none", "same-origin"):
            return "called from another site; only the viewer's own page may call it"
        return None


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status)


class OptionsRequest(BaseModel):
    """The options of :class:`FuseOptions` as the page sends them; that class says which go together."""

    model_config = ConfigDict(extra="forbid")

    fusion: str = FuseOptions.fusion
    blend: str = FuseOptions.blend
    colormap: str = FuseOptions.colormap
    weight_fixed: float = FuseOptions.weight_fixed
    aligned: bool = FuseOptions.aligned
    align_only: bool = FuseOptions.align_only
    refine: int = FuseOptions.refine
    mirrored: str = FuseOptions.mirrored


class JobRequest(BaseModel):
    """Which two uploaded images to fuse, and how."""

    fixed: str
    moving: str
    task: str = AUTO
    options: OptionsRequest = OptionsRequest()


@dataclass
class Inputs:
    """Decoded uploads, each with its role, by an identifier that cannot be guessed.

    The last of each role, uploaded or used, is what the page shows, and stays; of the others the oldest makes room.
    """

    kept: int
    images: dict[str, tuple[Role, Image]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, role: Role, image: Image) -> str:
        """Its identifier."""
        identifier = secrets.token_hex(8)
        with self.lock:
            self.images[identifier] = role, image
            last = {whose: key for key, (whose, _) in self.images.items()}.values()
            while len(self.images) > self.kept:
                self.images.pop(next(key for key in self.images if key not in last))
        return identifier

    def get(self, identifier: str) -> Image:
        """Raise :class:`RequestError` for one that is not here any more."""
        with self.lock:
            if identifier not in self.images:
                raise RequestError("the viewer does not hold this image any more; choose the file again")
            self.images[identifier] = self.images.pop(identifier)
            return self.images[identifier][1]


def upload_name(name: str) -> str:
    """A file name that stays in its folder, from whatever the browser calls the file."""
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    plain = "".join(c for c in last if c.isprintable()).strip().lstrip(".")
    # The end tells .nii.gz from .gz; 100 characters are at most 400 bytes, and file systems take 255.
    return plain.encode()[-120:].decode(errors="ignore") or "image"


async def _store(request: Request, path: Path, largest: int) -> None:
    """The request's body as a file, unless it is too large.

    Raises:
        RequestError: it is larger than ``largest`` bytes.
    """
    too_large = RequestError(f"{path.name}: more than {largest / 2**20:.0f} MiB; expected one image; crop it first")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > largest:
        raise too_large
    size = 0
    with path.open("wb") as handle:
        async for chunk in request.stream():
            size += len(chunk)
            if size > largest:
                raise too_large
            handle.write(chunk)


def create_app(cfg: ViewerCfg, *, port: int) -> FastAPI:
    """The application for a server on the loopback address and ``port``.

    Raises:
        WeightsError, RequestError: no such weights or device.
        FileNotFoundError, NotADirectoryError, ValueError: a root is no result folder.
    """
    check_device(cfg.device)
    find(cfg.weights)
    library = Library(cfg.roots)
    folder = tempfile.TemporaryDirectory(prefix="bsafusion-view-", ignore_cleanup_errors=True)
    temporary = Path(folder.name)
    jobs = Jobs(library, temporary, weights=cfg.weights, device=cfg.device)
    inputs = Inputs(cfg.inputs_kept)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await run_in_threadpool(jobs.close)
            folder.cleanup()

    # No generated documentation: its page loads from the network.
    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, port=port)
    app.state.temporary = temporary
    _add_errors(app)
    _add_inputs(app, cfg, temporary, inputs)
    _add_jobs(app, jobs, inputs)
    _add_results(app, library)

    @app.get("/")
    def index() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    @app.get("/api/state")
    def state() -> dict[str, Any]:
        model, message = jobs.model_state()
        return {
            "version": version_of("bsafusion"),
            "use": NOT_CLINICAL,
            "tasks": [AUTO, *TASKS],
            "choices": CHOICES,
            "most_steps": MOST_STEPS,
            "largest_upload": cfg.largest_upload,
            "model": model,
            "message": message,
            "browse": bool(cfg.roots),
        }

    app.mount("/static", StaticFiles(directory=STATIC))
    return app


def _add_errors(app: FastAPI) -> None:
    """Whatever goes wrong is one line of JSON for the page."""

    def answers(status: int) -> Callable[[Request, Exception], JSONResponse]:
        return lambda _, error: _error(status, told(error))

    def not_found(_: Request, __: Exception) -> JSONResponse:
        return _error(404, "no such result, file or image; reload the page")

    def http_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return _error(error.status_code, str(error.detail))

    for kind in (ImageError, RequestError, ValueError, OSError):
        app.add_exception_handler(kind, answers(422))
    app.add_exception_handler(RequestValidationError, lambda *_: _error(422, "malformed request; reload the page"))
    app.add_exception_handler(ClientDisconnect, answers(400))
    app.add_exception_handler(Busy, answers(409))
    app.add_exception_handler(KeyError, not_found)
    app.add_exception_handler(HTTPException, http_error)


def _add_inputs(app: FastAPI, cfg: ViewerCfg, temporary: Path, inputs: Inputs) -> None:
    @app.post("/api/inputs/{role}")
    async def upload(request: Request, role: Role, name: str, slice_index: int | None = None) -> dict[str, Any]:
        """The body is the file itself. It stays on disk only while it is decoded."""
        with tempfile.TemporaryDirectory(dir=temporary) as folder:
            path = Path(folder) / upload_name(name)
            await _store(request, path, cfg.largest_upload)
            image = await run_in_threadpool(lambda: read_input(path, role, slice_index=slice_index))
        return {
            "id": inputs.add(role, image),
            "name": image.source,
            "size": list(image.geometry.shape[::-1]),
            "format": image.meta.get("format", ""),
            "modality": str(image.modality),
            "colour": len(image.array) == 3,
            "slice_index": image.meta.get("slice_index"),
        }


def _add_jobs(app: FastAPI, jobs: Jobs, inputs: Inputs) -> None:
    @app.post("/api/jobs", status_code=202)
    def start(request: JobRequest) -> dict[str, Any]:
        options = FuseOptions(**request.options.model_dump())
        return jobs.start(inputs.get(request.fixed), inputs.get(request.moving), request.task, options).describe()

    @app.get("/api/jobs/{identifier}")
    def job(identifier: str) -> dict[str, Any]:
        return jobs.job(identifier).describe()

    @app.delete("/api/jobs/{identifier}")
    def cancel(identifier: str) -> dict[str, Any]:
        return jobs.cancel(identifier).describe()


def _add_results(app: FastAPI, library: Library) -> None:
    @app.get("/api/results")
    def results() -> list[dict[str, Any]]:
        return [entry.row() for entry in library.scan()]

    @app.get("/api/results/{key}")
    def result(key: str) -> JSONResponse:
        files = files_of(library.entry(key).folder)
        sizes = [{"name": name, "bytes": path.stat().st_size} for name, path in files.items()]
        # Encoded as read_report has tried to, whatever FastAPI's own way would make of it.
        return JSONResponse({"key": key, **library.view(key).describe(), "files": sizes})

    @app.get("/api/results/{key}/layers/{name}")
    def layer(key: str, name: str) -> Response:
        return Response(library.view(key).layers[name].array.tobytes(), media_type="application/octet-stream")

    @app.get("/api/results/{key}/thumbnail")
    def small(key: str) -> Response:
        return Response(thumbnail(library.entry(key).folder), media_type="image/png")

    @app.get("/api/results/{key}/files/{name}")
    def file(key: str, name: str) -> FileResponse:
        # Always as a download: a file of a result is not a page of this origin.
        path = files_of(library.entry(key).folder)[name]
        return FileResponse(path, filename=name, media_type="application/octet-stream")

    @app.get("/api/results/{key}/zip")
    def archive(key: str) -> Response:
        entry = library.entry(key)
        name = quote(f"{entry.folder.name}.zip", errors="replace")
        disposition = {"Content-Disposition": f"attachment; filename*=utf-8''{name}"}
        return Response(zip_of(entry.folder), media_type="application/zip", headers=disposition)


def listen(port: int = DEFAULT_PORT) -> socket.socket:
    """A socket on the loopback address; port 0 takes any free one.

    Raises:
        ValueError: no such port, or it is taken.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port {port}; expected 0 (any free one) to 65535")
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((LOOPBACK, port))
        listener.listen(64)  # from now on a browser waits instead of being refused
    except OSError as error:
        listener.close()
        raise ValueError(f"port {port} is not free ({error.strerror}); choose another one, or 0 for any") from error
    return listener


def address(listener: socket.socket) -> str:
    """Where the page is, for a socket of :func:`listen`."""
    return f"http://{LOOPBACK}:{listener.getsockname()[1]}/"


def build_server(cfg: ViewerCfg, listener: socket.socket) -> uvicorn.Server:
    """A server for ``server.run(sockets=[listener])``; errors as :func:`create_app`."""
    app = create_app(cfg, port=listener.getsockname()[1])
    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            ws="none",
            lifespan="on",
            timeout_graceful_shutdown=3,
        )
    )


def run(server: uvicorn.Server, listener: socket.socket) -> None:
    """Serve until Ctrl-C, which is how a viewer ends and no error."""
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])


def open_browser(url: str) -> None:
    """Show ``url`` in the user's browser, where there is one."""
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return  # a text browser would take over the terminal
    webbrowser.open(url)
