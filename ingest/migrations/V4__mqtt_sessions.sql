-- Sessions that a broker holds for mqtt-consumer. The broker alone cannot say that it has lost one: to a new process it
-- looks as if there had never been any.

CREATE TABLE mqtt_sessions (
    client_id  text COLLATE "C" NOT NULL,
    -- host:port, as the consumer was told.
    broker     text COLLATE "C" NOT NULL,
    -- What the session is subscribed to.
    filter     text NOT NULL,
    -- The process that was last subscribed: a number it drew when it started. When two processes with one client id take
    -- the session from each other, each finds the other's here.
    holder     text NOT NULL,
    first_seen timestamptz NOT NULL,
    -- When a consumer was last subscribed; written about once a minute.
    last_seen  timestamptz NOT NULL,
    -- When the broker last had no session where there should have been one.
    lost_at    timestamptz,
    -- When the member left for good (mqtt-consumer --leave). Such a session is not missed.
    ended_at   timestamptz,
    PRIMARY KEY (client_id, broker)
);
