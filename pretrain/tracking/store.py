"""Where MLflow lives: which URI is meant, whether it can work, and a client that gives up quickly.

MLflow reads its retry and time-out settings from environment variables. Its defaults (7 retries with back-off) make one
call block for four minutes when the server is gone; `connect` sets them to no retries and 15 seconds unless the user has
set them. The journal does the retrying.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE = "sqlite:///"
DATABASES = ("postgresql", "mysql", "mssql")
SERVERS = ("http", "https", "databricks")


def resolve_uri(uri: str = "") -> str:
    """The tracking URI meant by `uri`: itself, else MLFLOW_TRACKING_URI, else mlflow.db in the current directory.

    Relative sqlite paths become absolute ones, so that a later change of directory cannot split a run over two files.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI", "") or SQLITE + "mlflow.db"
    if uri.startswith(SQLITE) and uri != SQLITE:
        return SQLITE + os.path.abspath(uri[len(SQLITE) :])
    return uri


def sqlite_path(uri: str) -> Path | None:
    """The database file of a resolved sqlite URI, None for any other kind."""
    return Path(uri[len(SQLITE) :]) if uri.startswith(SQLITE) and uri != SQLITE else None


def validate_uri(uri: str) -> str | None:
    """What is wrong with a tracking URI ("" means the default), in one sentence with the remedy; None if nothing is.

    Contacts no server: a server that is down is no error, its points wait in the journal.
    """
    uri = resolve_uri(uri)
    scheme = uri.split(":", 1)[0].split("+", 1)[0] if ":" in uri else ""
    remedy = f"use {SQLITE}mlflow.db (one file, no server) or http://HOST:5000 of an `mlflow server`"
    if scheme in ("", "file"):
        return f"tracking.uri {uri!r} is MLflow's file store, which MLflow 3 refuses and which keeps points sent twice: {remedy}"
    if scheme == "sqlite":
        path = sqlite_path(uri)
        if path is None:
            return f"tracking.uri {uri!r} names no file: {remedy}"
        if not path.parent.is_dir():
            return f"tracking.uri {uri!r}: the folder {path.parent} does not exist: create it, or {remedy}"
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            return f"tracking.uri {uri!r}: {path} cannot be written: change its permissions, or {remedy}"
        return None
    if scheme not in (*DATABASES, *SERVERS):
        return f"tracking.uri {uri!r} is of no kind that MLflow knows: {remedy}"
    return None


def connect(uri: str) -> MlflowClient:
    """An MLflow client for a resolved URI. Makes no request for a server; opens (and creates) a database.

    Raises:
        the errors of `shipping_errors()` when a database cannot be opened.
    """
    defaults = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    # Some sixty lines of migration steps otherwise greet whoever creates a database.
    for chatty in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def shipping_errors() -> tuple[type[Exception], ...]:
    """What an absent, restarting, overloaded or misconfigured tracking store raises through MLflow's client.

    MlflowException wraps most of it. Uploads raise requests' own errors, databases SQLAlchemy's, artifact files and
    run.json OSError; a proxy that answers with a page of HTML gives ValueError (JSON) or protobuf's ParseError; a missing
    database driver gives ImportError.
    """
    from google.protobuf.json_format import ParseError
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, RequestException, SQLAlchemyError, ParseError, OSError, ValueError, ImportError


def brief(error: Exception) -> str:
    """An error of the store in one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
