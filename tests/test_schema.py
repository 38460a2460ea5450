"""Schema: what it holds, what it refuses."""

from tests import demo
from tests.refusals import refused


def test_attribute_look_up_lists_what_there_is():
    schema = demo.schema()
    assert schema.item_attribute("tags").length == 3
    refused(KeyError, "'item', 'category', 'tags'.*got 'gender'", schema.item_attribute, "gender")
