"""What mteb is given: a model directory or a running service, by its address (extra `mteb`)."""

import re
from typing import Any

from rayemb.evaluate.encoders import ModelEncoder, model_directory, name_of
from rayemb.evaluate.errors import EvaluateError
from rayemb.evaluate.mteb import MtebEncoder


def mteb_model(
    uri: str,
    *,
    search: bool = False,
    name: str | None = None,
    key: str | None = None,
    batch_size: int = 64,
    **more: Any,
) -> MtebEncoder:
    """The model at `uri` for `mteb.evaluate(mteb_model(uri), tasks)`.

    Args:
        uri: a model directory (ours or sentence-transformers'; path or URI), or the URL of a running service.
        search: of a service, let it search too (`rayemb.serve.client.mteb.MtebService`), instead of comparing its
            vectors here.
        name: what mteb calls it, `organisation/model`; default: `rayemb/` and the last part of the address.
        key: the API key, if the service wants one.
        batch_size: inputs that a model directory's model takes at a time.
        more: fields of mteb's `ModelMeta`, such as languages; with `search`, also arguments of `MtebService`.

    A service embeds queries as its index wants them: where that is of images, as the captions of images.
    Raises EvaluateError (mteb is not installed, a field that it does not take), ModelError, ServeError.
    """
    if re.match(r"https?://", uri):
        # Both import the service's client.
        from rayemb.serve.client import EndpointEncoder
        from rayemb.serve.client.mteb import MtebService

        if search:
            return MtebService(uri, name=name, key=key, **more)
        return MtebEncoder(EndpointEncoder(uri, name=name, key=key), **{"framework": ["API"], **more})
    if search:
        raise EvaluateError("a model directory searches nothing", where="search", fix="give the URL of a service")
    with model_directory(uri) as folder:  # what is imported of another library is read at once
        return MtebEncoder(ModelEncoder.open(folder, name=name or name_of(uri), batch_size=batch_size), **more)
