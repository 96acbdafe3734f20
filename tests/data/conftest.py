"""An S3 server on this machine, for the tests of remote data."""

import boto3
import pytest
import s3fs
from moto.server import ThreadedMotoServer


@pytest.fixture(scope="session")
def s3_server():
    """Its address. One server for all tests: moto keeps its buckets in this process, whatever server asks."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_client(s3_server, monkeypatch):
    """A client of the server, with an empty bucket called `bucket`; this process and its children find the same server."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "moto looks at none",
        "AWS_SECRET_ACCESS_KEY": "moto looks at none",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    client, bucket = boto3.client("s3"), boto3.resource("s3").Bucket("bucket")
    bucket.create()
    yield client
    bucket.objects.all().delete()
    bucket.delete()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def s3(s3_client):
    """The same through fsspec."""
    return s3fs.S3FileSystem(use_listings_cache=False)
