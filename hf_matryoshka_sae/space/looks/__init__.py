"""How things look on the page: charts, HTML, links, messages."""
