def test_x(http):
    from conftest import picture
