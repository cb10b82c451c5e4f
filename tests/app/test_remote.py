"""Where the command line looks for a server, by the server's own configuration."""

import pytest

from app.config import ServerSection
from app.remote import url_of


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:9"),
        ("0.0.0.0", "http://127.0.0.1:9"),
        ("::", "http://[::1]:9"),
        ("::1", "http://[::1]:9"),
        ("10.1.2.3", "http://10.1.2.3:9"),
        ("box.example", "http://box.example:9"),
    ],
)
def test_who_listens_on_all_addresses_is_reached_at_this_machines_own(host: str, url: str) -> None:
    assert url_of(ServerSection(host=host, port=9, allow_without_keys=True)) == url
