use std::sync::mpsc as std_mpsc;

use axum::Router;
use axum::body::Bytes;
use axum::http::StatusCode;
use axum::routing::post;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use prost::Message;
use tokio::net::TcpListener;

use super::*;

fn settings(endpoint: String) -> TraceSettings {
    TraceSettings { endpoint, timeout: Duration::from_secs(30), ..TraceSettings::default() }
}

fn span(name: &'static str) -> Span {
    let now = Moment::now();
    Span::new(name, now.time_of(now.instant() - Duration::from_millis(5)), now.time_of(now.instant()))
}

fn value(registry: &Registry, name: &str, reason: &str) -> f64 {
    let families = registry.gather();
    let family = families.iter().find(|family| family.name() == name).unwrap();
    let one =
        family.get_metric().iter().find(|one| one.get_label().iter().all(|label| label.value() == reason));
    one.unwrap().get_counter().get_value()
}

/// A process that hands `spans` in, is then asked to end, and has ended.
async fn run(settings: &TraceSettings, spans: Vec<(bool, Span)>) -> Registry {
    let registry = Registry::new();
    let mut process = Process::default();
    let tracer = Tracer::start(settings, "test", &registry, &mut process).unwrap();
    for (eventful, span) in spans {
        tracer.record(eventful, || span);
    }
    process.shutdown().cancel();
    process.run(Duration::from_secs(60)).await.unwrap();
    registry
}

/// A collector that answers everything with `status`.
async fn collector(status: StatusCode) -> (String, std_mpsc::Receiver<Bytes>) {
    let (sender, bodies) = std_mpsc::sync_channel(1000);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let take = move |body: Bytes| async move {
        sender.send(body).unwrap();
        status
    };
    let mut server = tokio::task::JoinSet::new();
    server.spawn(axum::serve(listener, Router::new().route("/v1/traces", post(take))).into_future());
    server.detach_all();
    (endpoint, bodies)
}

#[tokio::test]
async fn what_waits_at_the_end_is_sent_with_its_parts_values_and_errors() {
    let (endpoint, bodies) = collector(StatusCode::OK).await;
    let mut whole = span("batch").with("tier0.rows", 17_usize).with("messaging.system", "mqtt");
    whole.parts.push(span("try").failed("no route to host"));
    whole.parts.push(span("commit"));
    let registry = run(&settings(endpoint), vec![(false, whole)]).await;
    let body = bodies.try_recv().unwrap();
    let request = ExportTraceServiceRequest::decode(body).unwrap();
    let [resource] = request.resource_spans.as_slice() else { panic!("{request:?}") };
    let names = &resource.resource.as_ref().unwrap().attributes;
    assert!(format!("{names:?}").contains("test"), "{names:?}");
    let spans = &resource.scope_spans[0].spans;
    let named = |name: &str| spans.iter().find(|span| span.name == name).unwrap();
    let batch = named("batch");
    assert!(batch.parent_span_id.is_empty());
    assert_eq!(batch.end_time_unix_nano - batch.start_time_unix_nano, 5_000_000);
    let values = format!("{:?}", batch.attributes);
    assert!(values.contains("IntValue(17)") && values.contains("StringValue(\"mqtt\")"), "{values}");
    for part in ["try", "commit"] {
        assert_eq!(named(part).parent_span_id, batch.span_id, "{part}");
        assert_eq!(named(part).trace_id, batch.trace_id, "{part}");
    }
    assert_eq!(named("try").status.as_ref().unwrap().message, "no route to host");
    assert_eq!((spans.len(), value(&registry, "traces_exported_spans_total", "")), (3, 3.0));
}

#[tokio::test]
async fn a_collector_that_refuses_or_is_not_there_costs_spans_and_nothing_else() {
    let (refusing, _bodies) = collector(StatusCode::BAD_REQUEST).await;
    // Takes connections and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent_endpoint = format!("http://{}", silent.local_addr().unwrap());
    for endpoint in [refusing, "http://127.0.0.1:9".into(), silent_endpoint] {
        let begun = std::time::Instant::now();
        let settings = TraceSettings { timeout: Duration::from_millis(500), ..settings(endpoint.clone()) };
        let registry = run(&settings, vec![(true, span("batch"))]).await;
        assert!((value(&registry, "traces_dropped_spans_total", NOT_TAKEN) - 1.0).abs() < 0.1, "{endpoint}");
        assert!(begun.elapsed() < Duration::from_secs(30), "{endpoint}: {:?}", begun.elapsed());
    }
}

#[tokio::test]
async fn what_does_not_fit_the_queue_is_dropped_whole_and_counted() {
    let registry = Registry::new();
    let mut process = Process::default();
    let settings = TraceSettings { queue: 64, ..settings("http://127.0.0.1:9".into()) };
    let tracer = Tracer::start(&settings, "test", &registry, &mut process).unwrap();
    // Nothing is sent meanwhile: the runtime of this test has one thread, and it is not given back.
    for _ in 0..100 {
        tracer.record(true, || Span { parts: vec![span("a"), span("b")], ..span("batch") });
    }
    assert!((value(&registry, "traces_dropped_spans_total", QUEUE_FULL) - 237.0).abs() < 0.1, "21 of 3 fit");
}

#[tokio::test]
async fn the_uneventful_is_sampled_and_the_eventful_is_not() {
    let (endpoint, bodies) = collector(StatusCode::OK).await;
    let settings = TraceSettings { sample: 0.0, ..settings(endpoint) };
    let spans = (0..50).flat_map(|_| [(false, span("good")), (true, span("bad"))]).collect();
    run(&settings, spans).await;
    let request = ExportTraceServiceRequest::decode(bodies.try_recv().unwrap()).unwrap();
    let spans = &request.resource_spans[0].scope_spans[0].spans;
    assert_eq!(spans.len(), 50);
    assert!(spans.iter().all(|span| span.name == "bad"));
}

#[test]
fn without_an_endpoint_nothing_is_told_and_a_wrong_one_is_named() {
    Tracer::default().record(true, || panic!("nobody listens"));
    assert_eq!(TraceSettings::default().check(), Ok(()));
    for (bad, key) in [
        (settings("https://collector:4318".into()), "traces.endpoint"),
        (settings("http://".into()), "traces.endpoint"),
        (TraceSettings { sample: 1.5, ..TraceSettings::default() }, "traces.sample"),
        (TraceSettings { sample: f64::NAN, ..TraceSettings::default() }, "traces.sample"),
        (TraceSettings { queue: 1, ..TraceSettings::default() }, "traces.queue"),
        (TraceSettings { timeout: Duration::ZERO, ..TraceSettings::default() }, "traces.timeout"),
    ] {
        assert!(bad.check().unwrap_err().contains(key), "{key}");
    }
}
