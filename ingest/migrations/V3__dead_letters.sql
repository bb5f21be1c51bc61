-- Dead letters by day: old ones go a partition at a time, and what they take has a bound (ingest.dead_letter_max_bytes).

ALTER TABLE dead_letters RENAME TO dead_letters_before;
-- Reasons are checked no longer: a new one must never stop the pipeline.
ALTER TABLE dead_letters_before
    ALTER COLUMN id DROP IDENTITY,
    DROP CONSTRAINT dead_letters_pkey,
    DROP CONSTRAINT dead_letters_reason_check,
    ADD COLUMN payload_bytes bigint,
    ADD COLUMN payload_sha256 bytea;
DROP INDEX dead_letters_received_at;

CREATE TABLE dead_letters (
    id             bigint GENERATED ALWAYS AS IDENTITY,
    received_at    timestamptz NOT NULL,
    source         text NOT NULL,
    topic          text NOT NULL,
    reason         text NOT NULL,
    error          text NOT NULL,
    payload        bytea NOT NULL,
    -- Of a payload that is not stored whole: how long it was, and its SHA-256.
    payload_bytes  bigint,
    payload_sha256 bytea,
    PRIMARY KEY (received_at, id)
) PARTITION BY RANGE (received_at);
CREATE INDEX dead_letters_reason ON dead_letters (reason, received_at);

-- Whatever time a letter carries, there is a place for it, also when nobody makes partitions.
CREATE TABLE dead_letters_default PARTITION OF dead_letters DEFAULT;

-- Letters stored so far become the first partition.
DO $$
DECLARE
    cut timestamptz := date_trunc('second', now()) + interval '1 minute';
BEGIN
    IF NOT EXISTS (SELECT FROM dead_letters_before) THEN
        DROP TABLE dead_letters_before;
        RETURN;
    END IF;
    -- A letter from ahead of the clock would keep the whole partition for as long.
    WITH ahead AS (DELETE FROM dead_letters_before WHERE received_at >= cut RETURNING *)
    INSERT INTO dead_letters OVERRIDING SYSTEM VALUE SELECT * FROM ahead;
    PERFORM setval(pg_get_serial_sequence('dead_letters', 'id'),
                   1 + greatest((SELECT coalesce(max(id), 0) FROM dead_letters_before),
                                (SELECT coalesce(max(id), 0) FROM dead_letters)), false);
    EXECUTE format('ALTER TABLE dead_letters ATTACH PARTITION dead_letters_before FOR VALUES FROM (MINVALUE) TO (%L)', cut);
END
$$;

-- How much of a dead letter is stored now. One row, written by whoever keeps the partitions, read with every letter.
CREATE TABLE dead_letter_storage (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    letters  boolean NOT NULL,
    payloads boolean NOT NULL
);
INSERT INTO dead_letter_storage (letters, payloads) VALUES (true, true);
