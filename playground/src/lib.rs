//! Real servers and our own processes on one machine, for `tier0 up`, for the tests of every crate, for drills and
//! benchmarks.
//!
//! Everything started here is a child of this process and dies with it, however it dies, `kill -9` included. Nothing
//! here touches a system-wide service: own data, own ports, loopback only. Production code never depends on this
//! crate (`make check` proves it).
//!
//! A server is one small file: [`postgres`], [`mosquitto`]. To add one: generate its configuration from `config/`,
//! start it with [`child::Start`], wait for it with a request of its own protocol ([`child::Child::until`]).

pub mod account;
pub mod cgroup;
pub mod child;
pub mod cluster;
pub mod collector;
pub mod faketime;
pub mod http;
pub mod link;
pub mod metrics;
pub mod monitoring;
pub mod mosquitto;
pub mod pgbouncer;
pub mod port;
pub mod postgres;
pub mod process;
pub mod procfs;
pub mod program;
pub mod rabbitmq;
pub mod redis;
pub mod regions;
pub mod scratch;
pub mod shipped;
