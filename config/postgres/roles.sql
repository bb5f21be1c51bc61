-- Who may do what in Postgres, as little as each needs. Run by a superuser on a new cluster, in database tier0_db, which
-- owner tier0 has; a second time it changes passwords. Passwords come as settings of the session (tier0.writer_password ..):
-- so they stand in no statement that could be logged.
--
--   tier0       owner of database and tables, no superuser: makes and drops partitions, brings the schema up to date (mqtt-consumer)
--   writer      adds and changes rows, no tables of its own but temporary ones (rabbitmq-consumer)
--   reader      reads every table, writes none (Grafana)
--   monitor     server statistics; no table (exporters, the orchestrator's probes)
--   replicator  streams WAL; what pg_rewind needs is granted by the region-agent
DO $$
DECLARE
    role record;
BEGIN
    FOR role IN SELECT * FROM (VALUES ('tier0', ''), ('writer', ''), ('reader', ''), ('monitor', ''),
                                      ('replicator', 'REPLICATION')) AS wanted (name, option)
    LOOP
        IF coalesce(current_setting('tier0.' || role.name || '_password', true), '') = '' THEN
            RAISE EXCEPTION 'tier0.%_password is not set', role.name;
        END IF;
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = role.name) THEN
            EXECUTE format('CREATE ROLE %I LOGIN %s', role.name, role.option);
        END IF;
        EXECUTE format('ALTER ROLE %I NOSUPERUSER NOCREATEDB NOCREATEROLE PASSWORD %L', role.name,
                       current_setting('tier0.' || role.name || '_password'));
    END LOOP;
END
$$;

GRANT pg_monitor TO monitor;
ALTER ROLE monitor SET default_transaction_read_only = on;
ALTER ROLE monitor SET statement_timeout = '30s';
ALTER ROLE reader SET default_transaction_read_only = on;
ALTER ROLE reader SET statement_timeout = '30s';
-- A dashboard's query takes one core at most, the readings need the others.
ALTER ROLE reader SET max_parallel_workers_per_gather = 0;

ALTER DATABASE tier0_db OWNER TO tier0;
REVOKE ALL ON DATABASE tier0_db, postgres, template1 FROM PUBLIC;
GRANT CONNECT ON DATABASE tier0_db TO writer, reader, monitor;
GRANT TEMPORARY ON DATABASE tier0_db TO writer;
-- Probes of the orchestrator, pg_rewind and the agents' look at another node go to database postgres.
GRANT CONNECT ON DATABASE postgres TO monitor, replicator;

-- Tables come with migrations, made by tier0: what writer may do with them is said beforehand. No DELETE, no TRUNCATE.
ALTER SCHEMA public OWNER TO tier0;
REVOKE ALL ON SCHEMA public FROM PUBLIC;
GRANT USAGE ON SCHEMA public TO writer, reader, monitor;
ALTER DEFAULT PRIVILEGES FOR ROLE tier0 IN SCHEMA public GRANT SELECT, INSERT, UPDATE ON TABLES TO writer;
-- Not by pg_read_all_data: that reads pg_authid too, where the passwords' hashes are.
ALTER DEFAULT PRIVILEGES FOR ROLE tier0 IN SCHEMA public GRANT SELECT ON TABLES TO reader;
GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader;
REVOKE pg_read_all_data FROM reader;
