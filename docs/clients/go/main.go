// Ranks candidates for a user with recent events. Build and run: docs/other_languages.md.
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	pb "aif_jax/preranking"
)

func main() {
	connection, err := grpc.Dial(os.Args[1], grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Fatal(err)
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second) // the engine's budget
	defer cancel()

	now := int64(1700000900)
	answer, err := pb.NewPreRankingClient(connection).Rank(ctx, &pb.RankRequest{
		User: &pb.User{
			Id:  &pb.Id{Id: &pb.Id_Text{Text: "ann"}},
			Now: &now,
			Events: map[string]*pb.Column{
				"item": {Integers: []int64{17, 1017}},
				"time": {Integers: []int64{1700000000, 1700000050}},
			},
		},
		Candidates: &pb.Candidates{Ids: []int64{17, 1017, 2017, 3017}},
		K:          2,
	})
	if err != nil {
		log.Fatal(err)
	}
	for i, id := range answer.Best.Ids {
		fmt.Println(id, answer.Scores[i])
	}
}
