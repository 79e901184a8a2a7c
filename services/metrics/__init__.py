"""What services tell Prometheus. The services count in plain attributes; all is read when somebody scrapes.

`catalog` has every metric with its meaning, `collect` reads them off the services, `page` makes docs/metrics.md of the catalog.
"""
