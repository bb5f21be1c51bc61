//! Users of ten web sites: their sessions as events and site reports over RabbitMQ, with a ledger of what was confirmed.

pub mod books;
pub mod life;
pub mod message;
pub mod metrics;
pub mod publisher;
pub mod run;
pub mod settings;
pub mod trouble;
