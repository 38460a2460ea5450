// One ranking over HTTP with Java's own client: java RankHttp.java http://127.0.0.1:8080

import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.time.Duration;

class RankHttp {
  public static void main(String[] args) throws Exception {
    String call = """
        {"user": "ann", "now": 1700000900, "k": 2, "candidates": [17, 1017, 2017, 3017],
         "events": {"item": [17, 1017], "time": [1700000000, 1700000050]}}""";
    HttpRequest request = HttpRequest.newBuilder(URI.create(args[0] + "/v1/rank"))
        .timeout(Duration.ofSeconds(10))
        .header("content-type", "application/json")
        .POST(HttpRequest.BodyPublishers.ofString(call))
        .build();
    HttpClient client = HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).build();
    for (int time = 0; time < 2; time++) { // the second call uses the connection of the first
      HttpResponse<String> answer = client.send(request, HttpResponse.BodyHandlers.ofString());
      System.out.println(answer.statusCode() + " " + answer.body());
    }
  }
}
