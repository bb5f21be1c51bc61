-- The newest state of each user session, and the load reports of web sites. Column names are public, those that end
-- in _at excepted: they carry what is needed to merge events in any order (ingest/src/session.rs).

CREATE TABLE user_sessions (
    session_id        text COLLATE "C" PRIMARY KEY,
    user_id           text COLLATE "C" NOT NULL,
    username          text COLLATE "C",
    connection_status text COLLATE "C" NOT NULL CHECK (connection_status IN ('active', 'idle', 'disconnected')),
    region            text COLLATE "C",
    ip_address        text COLLATE "C",
    login_time        timestamptz,
    -- Set while the session is disconnected.
    logout_time       timestamptz,
    last_activity     timestamptz NOT NULL,
    -- Times of the events that brought these details, since later events may lack them.
    username_at       timestamptz,
    region_at         timestamptz,
    ip_address_at     timestamptz,
    -- The newest logout, also while the session is in use again.
    logout_at         timestamptz
) WITH (fillfactor = 60); -- Rows change all the time: room for them on their own page keeps the index still.

CREATE TABLE site_activity (
    site_id       text COLLATE "C" NOT NULL,
    timestamp_utc timestamptz NOT NULL,
    metrics       jsonb NOT NULL,
    PRIMARY KEY (timestamp_utc, site_id)
);
