-- Tables of the contract that the telemetry path needs. Column names are public.
-- Text keys are COLLATE "C": ids are compared as bytes, which is cheaper and the same on every node.

CREATE TABLE device_telemetry (
    device_id     text COLLATE "C" NOT NULL,
    device_type   text COLLATE "C" NOT NULL,
    site_id       text COLLATE "C" NOT NULL,
    timestamp_utc timestamptz NOT NULL,
    firmware      text COLLATE "C",
    metrics       jsonb NOT NULL,
    status        jsonb,
    location      jsonb,
    tags          jsonb,
    -- Time leads: arrivals land at the right edge of the index. See ARCHITECTURE.md for the figures.
    PRIMARY KEY (timestamp_utc, device_id)
) PARTITION BY RANGE (timestamp_utc);

CREATE TABLE dead_letters (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    received_at timestamptz NOT NULL,
    source      text NOT NULL,
    topic       text NOT NULL,
    reason      text NOT NULL CHECK (reason IN ('not_json', 'missing_field', 'wrong_type', 'topic_mismatch',
                                                'timestamp_out_of_range', 'too_large', 'rejected_by_database')),
    error       text NOT NULL,
    payload     bytea NOT NULL
);
CREATE INDEX dead_letters_received_at ON dead_letters (received_at);

CREATE TABLE sites (
    site_id   text COLLATE "C" PRIMARY KEY,
    latitude  double precision NOT NULL,
    longitude double precision NOT NULL
);

CREATE TABLE device_registry (
    device_id   text COLLATE "C" PRIMARY KEY,
    device_type text COLLATE "C" NOT NULL,
    site_id     text COLLATE "C" NOT NULL REFERENCES sites,
    firmware    text COLLATE "C"
);
