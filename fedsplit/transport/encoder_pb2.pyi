from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class CapabilitiesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CapabilitiesReply(_message.Message):
    __slots__ = ("fedsplit_version", "backbone", "backbone_sha256", "blocks", "width", "pooled_width", "versions")
    FEDSPLIT_VERSION_FIELD_NUMBER: _ClassVar[int]
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    BACKBONE_SHA256_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    POOLED_WIDTH_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    fedsplit_version: str
    backbone: str
    backbone_sha256: str
    blocks: int
    width: int
    pooled_width: int
    versions: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, fedsplit_version: _Optional[str] = ..., backbone: _Optional[str] = ..., backbone_sha256: _Optional[str] = ..., blocks: _Optional[int] = ..., width: _Optional[int] = ..., pooled_width: _Optional[int] = ..., versions: _Optional[_Iterable[str]] = ...) -> None: ...

class PublishChunk(_message.Message):
    __slots__ = ("version", "total_bytes", "data")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    version: str
    total_bytes: int
    data: bytes
    def __init__(self, version: _Optional[str] = ..., total_bytes: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class PublishReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CollectRequest(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: str
    def __init__(self, version: _Optional[str] = ...) -> None: ...

class CollectChunk(_message.Message):
    __slots__ = ("site", "total_bytes", "data")
    SITE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    site: str
    total_bytes: int
    data: bytes
    def __init__(self, site: _Optional[str] = ..., total_bytes: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...
